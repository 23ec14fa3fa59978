"""Networks by name: shipped, added, downloaded; a download that isn't what the manifest says becomes no network."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from esrfs.networks import registry
from esrfs.networks.registry import Official, WeightsError

CONTENT = b"PK" + np.random.default_rng(0).bytes(1_000_000)


@pytest.fixture(autouse=True)
def _own_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Somewhere to download to."""
    return tmp_path / "folder"


def test_shipped_networks_are_found() -> None:
    path = registry.find("lite-x2")
    assert path.name == "lite-x2.safetensors"
    assert "lite-x2" in registry.names()
    listed = next(entry for entry in registry.listing() if entry.name == "lite-x2")
    assert listed.origin == "shipped"
    assert listed.bytes == path.stat().st_size
    assert listed.spec is not None
    assert listed.spec.scale == 2


def test_weights_inside_the_wheel_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "esrfs"
    (package / "networks").mkdir(parents=True)
    monkeypatch.setattr(registry, "__file__", str(package / "networks" / "registry.py"))
    assert registry.shipped_directory() == tmp_path / "site-packages" / "weights"
    (package / "weights").mkdir()
    assert registry.shipped_directory() == package / "weights"


def test_every_shipped_network_has_a_card() -> None:
    for path in registry.shipped_directory().glob("*.safetensors"):
        card = path.with_suffix(".md").read_text()
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card, f"{path.name}'s card is of another file"


def test_the_manifest_names_the_official_weights() -> None:
    official = registry.official()
    assert len(official) == 6
    for name, entry in official.items():
        assert entry.url.startswith("https://github.com/xinntao/Real-ESRGAN/releases/download/v0.")
        assert entry.url.endswith(f"/{name}.pth")
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.scale in {2, 4}


def test_unknown_and_not_yet_pulled_networks_say_what_to_do() -> None:
    with pytest.raises(WeightsError, match="esrfs weights pull realesr-general-x4v3"):
        registry.find("realesr-general-x4v3")
    with pytest.raises(WeightsError, match=r"no network called 'lite-x9'; esrfs has .*lite-x2,"):
        registry.find("lite-x9")
    with pytest.raises(WeightsError, match="no network"):
        registry.find("../weights/lite-x2")


def test_adding(tmp_path: Path) -> None:
    source = tmp_path / "mine.safetensors"
    source.write_bytes(registry.find("lite-x2").read_bytes())
    path = registry.add(source)
    assert path == registry.find("mine") == tmp_path / "data/esrfs/weights/mine.safetensors"
    assert registry.add(source) == path, "the same again is no error"
    assert [entry.name for entry in registry.listing() if entry.origin == "user"] == ["mine"]
    assert registry.add(source, "other") == registry.find("other")
    for name, message in (("lite-x2", "already"), ("RealESRGAN_x4plus", "official"), ("a/b", "can't name")):
        with pytest.raises(WeightsError, match=message):
            registry.add(source, name)
    source.write_bytes(source.read_bytes()[:-4] + b"abcd")
    with pytest.raises(WeightsError, match="already"):
        registry.add(source)
    text = tmp_path / "text.pth"
    text.write_text("not weights")
    with pytest.raises(WeightsError, match="neither"):
        registry.add(text)
    with pytest.raises(WeightsError, match="can't be read"):
        registry.add(tmp_path / "absent.pth")


@dataclass
class Server:
    """What the test's HTTP server sends, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    ranges: bool = True
    stop_after: int | None = None
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
            if begin >= len(state.content):
                self.send_error(416)
                return
            body = state.content[begin:]
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(state.content) - 1}/{len(state.content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.stop_after])

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        state.url = f"http://127.0.0.1:{http_server.server_address[1]}/some.pth"
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http_server.shutdown()
        thread.join()


def _catalogue(server: Server, size: int | None = len(CONTENT), content: bytes = CONTENT) -> dict[str, Official]:
    sha256 = hashlib.sha256(content).hexdigest()
    return {"some": Official(server.url, sha256, "BSD-3-Clause", "RRDBNet", 4, "for tests", size)}


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_pulling(server: Server, folder: Path, size: int | None) -> None:
    seen: list[tuple[int, int | None]] = []
    path = registry.pull("some", folder, catalogue=_catalogue(server, size), progress=lambda *a: seen.append(a))
    assert path.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [path]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert registry.pull("some", folder, catalogue=_catalogue(server)) == path
    assert server.asked == [None], "what is here isn't downloaded again"


def test_pulled_weights_are_found_by_name(server: Server) -> None:
    path = registry.pull("some", catalogue=_catalogue(server))
    assert registry.find("some") == path


def test_an_interrupted_download_goes_on(server: Server, folder: Path) -> None:
    server.stop_after = 400_000
    with pytest.raises(WeightsError, match="goes on"):
        registry.pull("some", folder, catalogue=_catalogue(server))
    assert (folder / "some.pth.partial").stat().st_size == 400_000
    assert not (folder / "some.pth").exists()
    server.stop_after = None
    assert registry.pull("some", folder, catalogue=_catalogue(server)).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-"]


def test_a_server_without_ranges_begins_anew(server: Server, folder: Path) -> None:
    server.ranges = False
    folder.mkdir()
    (folder / "some.pth.partial").write_bytes(CONTENT[:1000])
    assert registry.pull("some", folder, catalogue=_catalogue(server)).read_bytes() == CONTENT


def test_killed_between_download_and_rename(server: Server, folder: Path) -> None:
    folder.mkdir()
    (folder / "some.pth.partial").write_bytes(CONTENT)
    assert registry.pull("some", folder, catalogue=_catalogue(server)).read_bytes() == CONTENT
    assert server.asked == []


@pytest.mark.parametrize("size", [None, len(CONTENT)])
@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"x" * 100], ids=["changed", "longer"])
def test_a_mismatch_is_refused(server: Server, folder: Path, content: bytes, size: int | None) -> None:
    server.content = content
    with pytest.raises(WeightsError, match="expected"):
        registry.pull("some", folder, catalogue=_catalogue(server, size))
    assert list(folder.iterdir()) == []
    server.content = CONTENT
    registry.pull("some", folder, catalogue=_catalogue(server, size))


def test_a_partial_file_of_something_else_is_found_out(server: Server, folder: Path) -> None:
    folder.mkdir()
    (folder / "some.pth.partial").write_bytes(b"?" * 1000)
    with pytest.raises(WeightsError, match="expected"):
        registry.pull("some", folder, catalogue=_catalogue(server))
    assert registry.pull("some", folder, catalogue=_catalogue(server)).read_bytes() == CONTENT


def test_a_server_that_is_gone(server: Server, folder: Path) -> None:
    catalogue = {"some": Official("http://127.0.0.1:1/some.pth", "00", "", "RRDBNet", 4, "")}
    with pytest.raises(WeightsError, match="could not be downloaded"):
        registry.pull("some", folder, catalogue=catalogue)
    with pytest.raises(WeightsError, match="the manifest has some"):
        registry.pull("other", folder, catalogue=catalogue)


def test_a_family_is_its_networks_of_each_scale() -> None:
    assert "lite-x2" in registry.family("lite")
    enlarging = {f"lite-x{scale}" for scale in range(1, 5)}
    assert set(registry.family("lite")) <= enlarging | {registry.SHRINKER + name for name in enlarging}
    assert list(registry.family("lite-x2")) == ["lite-x2", "shrink-lite-x2"]
    with pytest.raises(WeightsError, match="no network"):
        registry.family("heavy")
