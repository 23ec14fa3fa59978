"""Networks that a store has lost and esrfs still has (a backup left out ``.esrfs/networks``)."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esrfs.networks import registry
from esrfs.store import layout
from esrfs.store.errors import StoreError
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep.networks import network_bytes

NETWORK = b"PK weights"
SHA256 = hashlib.sha256(NETWORK).digest()
ExpectLog = Callable[[str], None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init(str(tmp_path / "store"))
    with open_store(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def own() -> Path:
    """The user has the network, by a name that says nothing."""
    registry.user_directory().mkdir(parents=True)
    path = registry.user_directory() / "whatever.pth"
    path.write_bytes(NETWORK)
    return path


def kept(store: Store) -> Path:
    return Path(store.path, ".esrfs", "networks", SHA256.hex())


@pytest.mark.parametrize("left", [None, b"", b"PK w3ights"])
def test_what_is_lost_or_damaged_is_put_back(
    store: Store, own: Path, left: bytes | None, expect_log: ExpectLog, caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("was lost and is put back")
    if left is not None:
        kept(store).write_bytes(left)
    assert network_bytes(store, SHA256) == NETWORK
    assert kept(store).read_bytes() == NETWORK
    assert os.listdir(kept(store).parent) == [SHA256.hex()]
    assert str(own) in caplog.text
    own.unlink()
    assert network_bytes(store, SHA256) == NETWORK
    assert caplog.text.count("put back") == 1


def test_a_full_disk_is_no_reason_not_to_use_it(
    store: Store, own: Path, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectLog
) -> None:
    expect_log("can't be put back")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(layout, "write_durably", full)
    assert network_bytes(store, SHA256) == NETWORK
    assert not kept(store).exists()


def test_a_store_that_is_only_read_is_not_written(store: Store, own: Path) -> None:
    with open_store(store.path, readonly=True) as opened:
        assert network_bytes(opened, SHA256) == NETWORK
    assert not kept(store).exists()


def test_another_file_of_that_name_is_not_used(store: Store, own: Path) -> None:
    own.write_bytes(b"PK another")
    with pytest.raises(StoreError, match=f"{SHA256.hex()} is missing.*esrfs weights add"):
        network_bytes(store, SHA256)
    assert not kept(store).exists()


def test_official_networks_can_be_had_again(store: Store) -> None:
    name, entry = next(iter(registry.official().items()))
    with pytest.raises(StoreError, match=f"esrfs weights pull {name}"):
        network_bytes(store, bytes.fromhex(entry.sha256))
