"""How an encoded recipe is compressed: raw deflate (RFC 1951) with a preset dictionary of what recurs in recipes.

A recipe is short, and nearly all of it that is no hash recurs in every other recipe rather than in itself: names of
fields, the standard's JPEG tables, the chunks with which a PNG begins. Deflate finds little in one recipe, and nearly
all of it in ``DICTIONARY_1``.

``DICTIONARY_1`` is part of the format: blobs can't be read without it, so no byte of it may ever change (a test has its
SHA-256). A better one would be dictionary 2, with another flag in the footer (``container.py``).

What is wanted most stands last, since deflate writes short distances in fewer bits.
"""

from __future__ import annotations

import struct
import zlib

_ENVELOPE = b"".join(
    (
        # Of XMP, Exif and other segments and chunks.
        b'http://ns.adobe.com/xap/1.0/\x00<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 5.6.0">\n '
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n  <rdf:Description rdf:about=""\n    '
        b'xmlns:xmp="http://ns.adobe.com/xap/1.0/"\n    xmlns:dc="http://purl.org/dc/elements/1.1/"\n    '
        b'xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"\n    xmlns:exif="http://ns.adobe.com/exif/1.0/"\n    '
        b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"\n    xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"\n    '
        b'xmp:CreatorTool="" xmp:CreateDate="20" xmp:ModifyDate="20" xmp:Rating="0">\n   '
        b"<dc:subject>\n    <rdf:Bag>\n     <rdf:li>",
        b"</rdf:li>\n    </rdf:Bag>\n   </dc:subject>\n  </rdf:Description>\n </rdf:RDF>\n</x:xmpmeta>\n",
        b" " * 100 + b'\n<?xpacket end="w"?>',
        b"Photoshop 3.0\x008BIM\x04\x04\x00\x00\x00\x00\x00\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00\x01",
        b"MPF\x00II*\x00",
        b"\xff\xe2ICC_PROFILE\x00\x01\x01\x00\x00mntrRGB XYZ \x07acspAPPL\x00\x00\x00\x00",
        b"\x00\x00\x00\x00\x00\x00\xf6\xd6\x00\x01\x00\x00\x00\x00\xd3-",
        b"descrXYZgXYZbXYZwtptcprtrTRCgTRCbTRCtext\x00\x00\x00\x00Copyright ",
        b"Canon\x00Canon EOS \x00NIKON CORPORATION\x00NIKON D\x00SONY\x00Panasonic\x00FUJIFILM\x00OLYMPUS\x00",
        b"PENTAX\x00",
        b"Google\x00Pixel \x00samsung\x00Apple\x00iPhone \x00Adobe Photoshop Lightroom \x00Picasa\x00GIMP 2.10\x00",
        b"ASCII\x00\x00\x00 UNICODE\x00R98\x000100WGS-84\x0020:00:00 00:00:00\x00",
        # PNG: chunks between IHDR and IDAT.
        b"\x00\x00\x00 cHRM\x00\x00z&\x00\x00\x80\x84\x00\x00\xfa\x00\x00\x00\x80\xe8\x00\x00u0\x00\x00\xea`"
        b"\x00\x00:\x98\x00\x00\x17p\x9c\xbaQ<",
        b"iCCPICC Profile\x00\x00x\x9ceXIfiTXtXML:com.adobe.xmp\x00\x00\x00\x00\x00",
        b"tEXtSoftware\x00Adobe ImageReadyq\xc9e<",
        b"tEXtdate:create\x00tEXtdate:modify\x0020-T:+00:00tEXtComment\x00tEXtsource\x00",
        b"\x00\x00\x00\x04sBIT\x08\x08\x08\x08|\x08d\x88\x00\x00\x00\tpHYs\x00\x00\x0e\xc3\x00\x00\x0e\xc3\x01\xc7o\xa8d",
        b"\x00\x00\x00\tpHYs\x00\x00\x0e\xc4\x00\x00\x0e\xc4\x01\x95+\x0e\x1b",
        b"\x00\x00\x00\tpHYs\x00\x00\x0b\x13\x00\x00\x0b\x13\x01\x00\x9a\x9c\x18\x00\x00\x00\x07tIME\x07",
        b"\x00\x00\x00\x06bKGD\x00\xff\x00\xff\x00\xff\xa0\xbd\xa7\x93"
        b"\x00\x00\x00\tpHYs\x00\x00\x0b\x12\x00\x00\x0b\x12\x01\xd2\xdd~\xfc\x00\x00\x00\x07tIME\x07",
    )
)

_TAGS = (
    # (tag, type, count) of Exif, in the order in which they stand in a file.
    (0x10E, 2, 32), (0x10F, 2, 6), (0x110, 2, 10), (0x112, 3, 1), (0x11A, 5, 1), (0x11B, 5, 1), (0x128, 3, 1),
    (0x131, 2, 12), (0x132, 2, 20), (0x13B, 2, 1), (0x213, 3, 1), (0x8298, 2, 1), (0x8769, 4, 1), (0x8825, 4, 1),
    (0x829A, 5, 1), (0x829D, 5, 1), (0x8822, 3, 1), (0x8827, 3, 1), (0x8830, 3, 1), (0x9000, 7, 4), (0x9003, 2, 20),
    (0x9004, 2, 20), (0x9010, 2, 7), (0x9011, 2, 7), (0x9012, 2, 7), (0x9101, 7, 4), (0x9102, 5, 1), (0x9201, 10, 1),
    (0x9202, 5, 1), (0x9203, 10, 1), (0x9204, 10, 1), (0x9205, 5, 1), (0x9207, 3, 1), (0x9208, 3, 1), (0x9209, 3, 1),
    (0x920A, 5, 1), (0x9214, 3, 4), (0x927C, 7, 256), (0x9286, 7, 8), (0x9290, 2, 3), (0x9291, 2, 3), (0x9292, 2, 3),
    (0xA000, 7, 4), (0xA001, 3, 1), (0xA002, 4, 1), (0xA003, 4, 1), (0xA005, 4, 1), (0xA20E, 5, 1), (0xA20F, 5, 1),
    (0xA210, 3, 1), (0xA217, 3, 1), (0xA300, 7, 1), (0xA301, 7, 1), (0xA302, 7, 8), (0xA401, 3, 1), (0xA402, 3, 1),
    (0xA403, 3, 1), (0xA404, 5, 1), (0xA405, 3, 1), (0xA406, 3, 1), (0xA407, 3, 1), (0xA408, 3, 1), (0xA409, 3, 1),
    (0xA40A, 3, 1), (0xA40C, 3, 1), (0xA420, 2, 33), (0xA432, 5, 4), (0xA433, 2, 6), (0xA434, 2, 32),
    (0, 1, 4), (1, 2, 2), (2, 5, 3), (3, 2, 2), (4, 5, 3), (5, 1, 1), (6, 5, 1), (7, 5, 3), (0x1D, 2, 11),
    (0x103, 3, 1), (0x11A, 5, 1), (0x11B, 5, 1), (0x128, 3, 1), (0x201, 4, 1), (0x202, 4, 1),
    # TIFF.
    (0xFE, 4, 1), (0x100, 3, 1), (0x101, 3, 1), (0x102, 3, 3), (0x103, 3, 1), (0x106, 3, 1), (0x111, 4, 1),
    (0x112, 3, 1), (0x115, 3, 1), (0x116, 3, 1), (0x117, 4, 1), (0x11A, 5, 1), (0x11B, 5, 1), (0x11C, 3, 1),
    (0x128, 3, 1), (0x13D, 3, 1), (0x153, 3, 3),
)  # fmt: skip
_SHORT = 3

# Tables of the JPEG standard (ITU-T T.81, annex K) as files have them: quantisation in zigzag order, all for Huffman.
_LUMA = bytes.fromhex(
    "100b0c0e0c0a100e0d0e1211101318281a181616183123251d283a333d3c3933383740485c4e404457453738506d51575f626768673e4d71"
    "797064785c656763"
)
_CHROMA = bytes.fromhex("1112121815182f1a1a2f6342384263" + "63" * 49)
_HUFFMAN = bytes.fromhex(
    "0000010501010101010100000000000000000102030405060708090a0b"
    "100002010303020403050504040000017d01020300041105122131410613516107227114328191a1082342b1c11552d1f024336272"
    "82090a161718191a25262728292a3435363738393a434445464748494a535455565758595a636465666768696a737475767778797a"
    "838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9da"
    "e1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
    "0100030101010101010101010000000000000102030405060708090a0b"
    "1100020102040403040705040400010277000102031104052131061241510761711322328108144291a1b1c109233352f0156272d1"
    "0a162434e125f11718191a262728292a35363738393a434445464748494a535455565758595a636465666768696a73747576777879"
    "7a82838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8"
    "d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"
)
_HUFFMAN_OF_GRAY = 1 + 16 + 12 + 1 + 16 + 162
_HUFFMAN_OF_DC = 1 + 16 + 12

_BYTES = b"\x82\xa4type\xa5bytes\xa4data\xc4"
_RUN = b"\x83\xa4type\xa3run\xa5value"

_JPEG = b"".join(
    (
        b"\xff\xc2\x00\x11\x08\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xc4\x00\x1f",
        _HUFFMAN[:_HUFFMAN_OF_DC],
        b"\xff\xc4\x00\x3c",
        _HUFFMAN[:_HUFFMAN_OF_DC],
        _HUFFMAN[_HUFFMAN_OF_GRAY:][:_HUFFMAN_OF_DC],
        b"\xff\xed",
        _BYTES + b"\x0e\xff\xda\x00\x0c\x03\x01\x00\x02\x10\x03\x10\x00\x00\x01\xabscan_length\xce\x00",
        b"\xff\xdd\x00\x04\x00\x00\xff\xc0\x00\x0b\x08\x01\x01\x11\x00\xff\xc4\x00\xd2",
        _HUFFMAN[:_HUFFMAN_OF_GRAY],
        b"\xff\xed",
        _BYTES + b"\x0a\xff\xda\x00\x08\x01\x01\x00\x00?\x00\xabscan_length\xce\x00",
        b"\x84\xa4type\xa6jpegxl\xa6behind\x02\xa6prefix\x91\x82\xa4type\xa5bytes\xa4data\xc5",
        b"\xa6coding\x86\xa4type\xa4jpeg\xa4mode\xa1L\xabsubsampling\xa54:4:4\xacquantisation\x91\xdc\x00@",
        b"\xa6coding\x86\xa4type\xa4jpeg\xa4mode\xa3RGB\xabsubsampling\xa54:2:2\xacquantisation\x93\xdc\x00@",
        b"\xa6coding\x86\xa4type\xa4jpeg\xa4mode\xa3RGB\xabsubsampling\xa54:4:4\xacquantisation\x93\xdc\x00@",
        b"\xa6coding\x86\xa4type\xa4jpeg\xa4mode\xa3RGB\xabsubsampling\xa54:2:0\xacquantisation\x93\xdc\x00@",
        b"\xabprogressive\xc3\xaacomponents\xc4\x03\x01\x02\x03\xa6prefix\x93\x82\xa4type\xa5bytes\xa4data\xc5",
        b"\xabprogressive\xc2\xaacomponents\xc4\x00\xa6prefix\x93\x82\xa4type\xa5bytes\xa4data\xc5\x02",
        b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x02\x01\x00H\x00H\x00\x00\xff\xe1\x00Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00",
        b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x01\x00`\x00`\x00\x00\xff\xe2\x0cXICC_PROFILE\x00\x01\x01\x00\x00",
        b"\xff\xd8\xff\xe1Exif\x00\x00II*\x00\x08\x00\x00\x00",
        b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00\xff\xdb\x00C\x00",
        b"\xff\xdb\x00\x84\x00\xff\xdb\x00C\x01\xff\xc0\x00\x11\x08\x01\x03\x01\x21\x00\x02\x11\x01\x03\x11\x01\xff\xc4",
        b"\x03\x01\x11\x00\x02\x11\x01\x03\x11\x01\xff\xc4",
        b"\xff\xc0\x00\x11\x08\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xc4\x01\xa2",
        _HUFFMAN,
        b"\xff\xed\x1fesrfs\x00",
        _RUN + b"\x00\xa5count\xcd",
        _BYTES + b"\x0e\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00?\x00\xabscan_length\xce\x00",
        b"\xa6suffix\x92" + _RUN + b"\xcc\xff\xa5count\xcd",
        _BYTES + b"\x02\xff\xd9\xa7encoder\xd9\x22pillow 13.0.0, libjpeg-turbo 3.2.0\xa6scores\x85\xabssimulacra2\xcb@",
    )
)

_TIFF = b"".join(
    (
        b"\xa6coding\x8f\xa4type\xa4tiff\xa4mode\xa3RGB\xabcompression\x05\xa9predictor\xc3\xa6planar\xc2\xaapart_width\xcd",
        b"\xabpart_height\x10\xa5tiled\xc2\xa5parts\xdc\x00\x92\x08\xcd\x92\xcd\xcd\x92\xce\x00\x01\xce\x00\x01\x92\xce\x00",
        b"\xa7between\xdc\x00" + b"\xc4\x00" * 20 + b"\xa5extra\xc4\x00\xa7streams\x90\xa9stream_of\x90",
        b"\xa5ycbcr\xc2\xaaown_tables\xc2\xa6prefix\x91"
        + _BYTES
        + b"\x08II*\x00\x08\x00\x00\x00\xabscan_length\xce\x00",
        b", libtiff 4.7.2, zlib 1.2.13\xa6scores\x85\xabssimulacra2\xcb@",
    )
)

_BMP = b"".join(
    (
        b"\xa6coding\x86\xa4type\xa3bmp\xa4mode\xa3RGB\xa4bits\x18\xa8top_down\xc2\xa7colours\xc4\x00\xa6fourth\xc4\x00",
        b"\xa6prefix\x91" + _BYTES + b"6BM6\x00\x00\x00\x00\x006\x00\x00\x00(\x00\x00\x00",
        b"\x00\x00\x01\x00\x18\x00\x00\x00\x00\x00\x00\x00\xc4\x0e\x00\x00\xc4\x0e\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\x13\x0b\x00\x00\x13\x0b\x00\x00\xabscan_length\xce\x00\xa6suffix\x91" + _BYTES + b"\x00",
        b"\xa7encoder\xadpillow 13.0.0\xa6scores\x85\xabssimulacra2\xcb@",
    )
)

_WEBP = b"".join(
    (
        b"\xa6coding\x86\xa4type\xa4webp\xa4mode\xa4RGBA\xa8lossless\xc3\xa7quality",
        b"\xa6coding\x86\xa4type\xa4webp\xa4mode\xa3RGB\xa8lossless\xc3\xa7quality",
        b"\xa6coding\x86\xa4type\xa4webp\xa4mode\xa3RGB\xa8lossless\xc2\xa7quality",
        b"\xa6method\x04\xa5alpha\xc4\x00\xa6prefix\x91" + _BYTES + b"\x14RIFF",
        b"WEBPVP8X\x0a\x00\x00\x00\x08\x00\x00\x00ALPHICCPEXIFXMP \x00\x00WEBPVP8L\x00\xabscan_length\xce\x00",
        b"\x00\x00WEBPVP8 \x00\x00\xabscan_length\xcd",
        b"\x00\xabscan_length\xce\x00\xa6suffix\x92" + _BYTES + b"(esRF",
        b"\x00\x00" + _RUN + b"\x00\xa5count\xcd",
        b"\xa7encoder\xbcpillow 13.0.0, libwebp 1.6.0\xa6scores\x85\xabssimulacra2\xcb@",
    )
)

_PNG = b"".join(
    (
        b"\xa6coding\x89\xa4type\xa3png\xa4mode\xa1L\xaecompress_level\x09\xa6coding\x89\xa4type\xa3png\xa4mode\xa2LA"
        b"\xaecompress_level\x09\xa5alpha\xc5\x00x\xda\xa6coding\x89\xa4type\xa3png\xa4mode\xa4RGBA\xaecompress_level\x06"
        b"\xa5alpha\xc4x\xda\xed\xc1\x01\x01\x00\x00\x00\x80\x90\xfe\xaf\xee\x08\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\xa4bits\x08\xaainterlaced\xc3\xa7colours\xc5\x04\x00\xa6dither\xc3\xa3key\xc4\x03\x00\x00\x00PLTEtRNS",
        b"\xa6coding\x89\xa4type\xa3png\xa4mode\xa3RGB\xaecompress_level\x03",
        b"\xa5alpha\xc4\x00\xa4bits\x08\xaainterlaced\xc2\xa7colours\xc4\x00\xa6dither\xc2\xa3key\xc4\x00",
        b"\xa6prefix\x97" + _BYTES + b"\xa6prefix\x95" + _BYTES + b"\xc5\x00",
        b"\xa6prefix\x93" + _BYTES + b"\x89PNG\x0d\x0a\x1a\x0a\x00\x00\x00\x0dIHDR\x00\x00",
        b"\x08\x06\x00\x00\x00\x08\x03\x00\x00\x00\x08\x00\x00\x00\x00",
        b"\x00\x00\x08\x02\x00\x00\x00",
        b"\x00\x00\x00\x04gAMA\x00\x00\xb1\x8f\x0b\xfca\x05\x00\x00\x00\x01sRGB\x00\xae\xce\x1c\xe9",
        b"\x00\x00\x00\x00\x01\xff\xeesRF",
        _RUN + b"\x00\xa5count\xce\x00\x0f\xff\xd0",
        _BYTES + b"\x08\x00\x10\x00\x00esRF",
        _RUN + b"\x00\xa5count\xce\x00\x01\xff",
        _BYTES + b"\x0c\x00\x00IDAT\xabscan_length\xce\x00",
        b"\xa6suffix\x93" + _BYTES + b"\x08\x00\x00",
        b"esRF" + _RUN + b"\x00\xa5count\xcd",
        _BYTES + b"\x10\x00\x00\x00\x00IEND\xaeB`\x82",
        b"\xa7encoder\xbcpillow 13.0.0, zlib-ng 2.3.3\xa6scores\x85\xabssimulacra2\xcb@",
    )
)

_RECIPE = b"".join(
    (
        b"\xa5scale\x04\xa7network\xb4realesr-general-x4v3\xaenetwork_sha256\xc4\x20",
        bytes.fromhex("8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292"),
        b"\xa6preset\xa8lossless\xa5scale\x01\xa7network\xa0\xaenetwork_sha256\xc4\x00\xa7qualityd\xa6preset\xa8faithful"
        b"\xa6preset\xa5small\xa6preset\xa8balanced\xa5scale\x03\xa7network\xa7lite-x3\xaenetwork_sha256\xc4\x20",
        b"\xa6preset\xa4high\xa5scale\x02\xa7network\xa7lite-x2\xaenetwork_sha256\xc4\x20",
        bytes.fromhex("f95c4e76af70f537d6a991e417df6ef571fb6b0be33ec8d4edf606c7bad452ae"),
        b"\xa7quality\x18\xabsubsampling\xa54:4:4\xa6coding\xabsubsampling\xa54:0:0\xabsubsampling\xa54:2:0\xa6coding",
        b"\xde\x00\x16\xa7version\x01\xa5width\xcd\xa6height\xcd\xadoriginal_size\xcd\xadoriginal_size\xce\x00",
        b"\xafsha256_original\xc4\x20\xabsha256_view\xc4\x20",
        b"\xa6preset\xa4high\xa5scale\x01\xa7network\xa0\xaenetwork_sha256\xc4\x00\xa7quality",
        b"\xaacreated_by\xabesrfs 0.1.0\xa9reference\xc4\x20\xa4note\xa0\xa3own\x90",
    )
)


_BEHIND_SCORES = (
    b"\xaaworst_tile\xcb@", b"\xa4psnr\xcb@", b"\xa6colour\xcb?", b"\xacworst_colour\xcb@", b"\xaacreated_by\xab",
)  # fmt: skip
"""What follows the recipe's scores, one after the other."""


def _quantisation() -> bytes:
    """The tables that libjpeg makes of the standard's for its qualities 50 to 100, as a recipe's coding has them."""
    return b"".join(
        b"\xdc\x00@" + bytes(min(max((value * (200 - 2 * quality) + 50) // 100, 1), 255) for value in table)
        for quality in range(50, 101)
        for table in (_LUMA, _CHROMA)
    )


def _exif(order: str) -> bytes:
    """Entries of Exif's directories, without values but that of a short number, which is 1."""
    return b"".join(
        struct.pack(f"{order}HHI", *tag) + (struct.pack(f"{order}HH", 1, 0) if tag[1] == _SHORT else b"")
        for tag in _TAGS
    )


def _scores() -> bytes:
    """The last 6 bytes of numbers of two decimals (as doubles), with what stands behind scores. The bits that are left
    there are those of a multiple of 1/25, below 8 of all 6 bytes, from there on of the last 5."""
    return b"".join(
        (part * (1 << 49) // 25 + 1 >> 1).to_bytes(6, "big") + behind for behind in _BEHIND_SCORES for part in range(25)
    )


DICTIONARY_1 = b"".join(
    (_quantisation(), _exif("<"), _exif(">"), _ENVELOPE, _TIFF, _BMP, _JPEG, _WEBP, _scores(), _PNG, _RECIPE)
)


def compressed(recipe: bytes) -> bytes:
    """An encoded recipe, smaller as a rule."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=DICTIONARY_1)
    return deflater.compress(recipe) + deflater.flush()


def inflater() -> zlib._Decompress:
    """What :func:`compressed` made goes in, the encoded recipe comes out."""
    return zlib.decompressobj(-zlib.MAX_WBITS, zdict=DICTIONARY_1)
