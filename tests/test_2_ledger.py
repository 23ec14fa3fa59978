"""Whatever happens to a ledger's tail, or to any byte of it, the other records can be read."""

from __future__ import annotations

import os
import tempfile

from hypothesis import given
from hypothesis import strategies as st

from esrfs.store import ledger
from esrfs.store.ledger import Day, Done, Found, Undone

texts = st.text(st.characters(codec="utf-8"), max_size=40)
records = st.lists(
    st.one_of(
        st.builds(Done, job=texts),
        st.builds(Undone, job=texts, why=texts),
        st.builds(Found, name=texts, why=texts),
        st.builds(Day, number=st.integers(0, 1 << 40), date=texts, boot=texts, uptime=st.floats(0, 1e9)),
    ),
    max_size=8,
)


@given(records, st.data())
def test_truncation_loses_the_tail_only(written, data):
    lines = [ledger.encode(record) for record in written]
    whole = b"".join(lines)
    end = data.draw(st.integers(0, len(whole)))
    complete = 0
    while complete < len(lines) and sum(map(len, lines[: complete + 1])) <= end:
        complete += 1
    reading = ledger.decode(whole[:end])
    assert reading.records == written[:complete]
    assert reading.damaged == 0
    assert reading.torn == (end > sum(map(len, lines[:complete])))


@given(records.filter(bool), st.data())
def test_a_flipped_byte_costs_its_own_record_and_at_most_the_next(written, data):
    """The next, when the byte was the newline between them."""
    lines = [ledger.encode(record) for record in written]
    hit = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[hit]) - 1))
    flip = data.draw(st.integers(1, 255))
    broken = bytearray(lines[hit])
    broken[at] ^= flip
    reading = ledger.decode(b"".join([*lines[:hit], bytes(broken), *lines[hit + 1 :]]))
    lost = 2 if at == len(lines[hit]) - 1 else 1
    assert reading.records == written[:hit] + written[hit + lost :]


@given(st.binary(max_size=300))
def test_garbage_is_no_record(data):
    assert ledger.decode(data).records == []


@given(records, st.binary(max_size=60), records)
def test_appending_goes_on_after_any_tail(before, tail, after):
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        os.write(fd, b"".join(map(ledger.encode, before)) + tail)
        for record in after:
            ledger.append_to(fd, record, fsync=False)
        assert ledger.read_fd(fd).records == before + after


@given(st.binary(max_size=60).map(os.fsdecode))
def test_any_path_survives(path):
    assert ledger.unquote(ledger.quote(path)) == path
