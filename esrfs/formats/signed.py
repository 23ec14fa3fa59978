"""Signatures over pixels that are not in the file itself: C2PA Content Credentials may be kept by a server, and the
file's XMP says which (Adobe's programs ask whether to attach or to publish them). They are of these very bytes all the
same."""

from __future__ import annotations

import re

from esrfs.compaction.outcome import Reason
from esrfs.formats.view import Unsupported

_ELSEWHERE = re.compile(rb"dcterms:provenance(\s{0,9}=\s{0,9}[\"']|>)\s{0,9}https?://")
"""An embedded one is named as ``self#jumbf=…``, and found where it lies."""


def check_xmp(xmp: bytes, kind: str, name: str) -> None:
    """Raises Unsupported (SIGNED). ``kind``: of the file, as ``identify`` names it; ``name``: for people."""
    if _ELSEWHERE.search(xmp):
        message = (
            f"a server keeps Content Credentials (C2PA) of this {name}, which sign its pixels; it stays bit for bit"
        )
        raise Unsupported(Reason.SIGNED, message, kind)
