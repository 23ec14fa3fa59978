"""References: what they depend on, and what not."""

from __future__ import annotations

from esrfs.blob import reference

KEY = reference.key_of(b"k" * 32)


def test_a_reference_is_of_the_scan_and_the_key() -> None:
    one = reference.reference(KEY, b"scan")
    assert len(one) == reference.REFERENCE_BYTES
    assert one == reference.reference(KEY, b"scan")
    assert one != reference.reference(KEY, b"sca")
    assert one != reference.reference(reference.key_of(b"l" * 32), b"scan")


def test_fill_at_its_end_counts_for_nothing() -> None:
    """Programs may shorten or lengthen it."""
    assert reference.reference(KEY, b"a\xff\x00b\xff\xff") == reference.reference(KEY, b"a\xff\x00b")


def test_the_stores_own_key_is_not_given_away() -> None:
    assert b"k" * 32 not in KEY
    assert len(KEY) == 32
