"""Many genuine blobs at the cost of a few: pictures are compacted once, then each blob is copied in the store with
another camera name in its EXIF (or other bytes after its end), as if just that file had been compacted.

So hundreds of cold files, each with a view of its own, cost no more than the first few.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Literal, Recipe
from esrfs.store.layout import StoreConfig, open_store
from tests.mounting import Mounted

_CAMERA = b"Test Camera"
"""The camera model in the sources' EXIF; a variation has another of the same length, so that no offset moves."""


@dataclass(frozen=True)
class Picture:
    """A compacted picture of the gallery."""

    blob: bytes
    view: bytes
    source: Path

    @property
    def recipe(self) -> Recipe:
        return container.unpack(self.blob).recipe


@dataclass(frozen=True)
class Gallery:
    """A store with a few compacted pictures that is never mounted itself: tests work on copies."""

    store: Path
    config: StoreConfig
    pictures: dict[str, Picture]


def camera(number: int) -> str:
    """The camera model that the EXIF of variation ``number`` names."""
    return f"Cam {number:07d}"


def vary(gallery: Gallery, name: str, number: int) -> Picture:
    """The picture ``name`` as if its file had differed in a few bytes of its envelope: a blob and a view of its own."""
    base = gallery.pictures[name]
    inner = container.unpack(base.blob)
    recipe = inner.recipe
    prefix, suffix = recipe.prefix, recipe.suffix
    if name.endswith(".png"):
        extra = f"variation {number:07d}".encode()
        suffix, view = [*suffix, Literal(extra)], base.view + extra
    else:
        model = camera(number).encode()
        view = base.view.replace(_CAMERA, model)
        prefix = [
            Literal(span.data.replace(_CAMERA, model)) if isinstance(span, Literal) else span for span in recipe.prefix
        ]
    digest = hashlib.sha256(view).digest()
    changed = msgspec.structs.replace(
        recipe, prefix=prefix, suffix=suffix, original_size=len(view), sha256_view=digest, sha256_original=digest
    )
    blob = container.pack(inner.avif, recipe_format.encode(changed), gallery.config.id_bytes, gallery.config.key_bytes)
    return Picture(blob, view, base.source)


class GalleryMount(Mounted):
    """A mount of a copy of the gallery's store, to be started by the test; put blobs into ``store`` before."""

    def __init__(self, base: Path, gallery: Gallery) -> None:
        self.store = base / "store"
        self.path = base / "mount"
        self.log_path = base / "mount.log"
        self.path.mkdir()
        shutil.copytree(gallery.store, self.store, symlinks=True)
        self.config = gallery.config
        self.process = None
        self.expected = []


@contextmanager
def _directories_of_its_own(base: Path) -> Iterator[None]:
    """A fixture that is made once for many tests comes before the one that gives each test its own."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("STATE", "CACHE", "DATA", "CONFIG"):
            patch.setenv(f"XDG_{kind}_HOME", str(base / kind.lower()))
        (base / "run").mkdir(mode=0o700)
        patch.setenv("XDG_RUNTIME_DIR", str(base / "run"))
        yield


def make_gallery(base: Path, sources: list[Path]) -> Gallery:
    """Compact ``sources`` in a store below ``base``; all of them must become blobs."""
    with _directories_of_its_own(base):
        mount = Mounted(base)
        try:
            mount.start()
            for source in sources:
                shutil.copy(source, mount.path)
            result = mount.compact()
            assert result.get("compacted") == len(sources), (result, mount.log())
            views = {source.name: (mount.path / source.name).read_bytes() for source in sources}
            assert mount.stop() == 0
        finally:
            mount.clean_up()
        pictures = {
            source.name: Picture((mount.store / source.name).read_bytes(), views[source.name], source)
            for source in sources
        }
        for name in pictures:
            (mount.store / name).unlink()
        with open_store(str(mount.store)) as store:
            return Gallery(mount.store, store.config, pictures)


def with_thumbnail(path: Path, image: Image.Image) -> None:
    """Put a thumbnail of 160 pixels into the EXIF of the JPEG at ``path``, as cameras do; needs exiftool."""
    small = image.copy()
    small.thumbnail((160, 160))
    thumbnail = path.with_suffix(".thumbnail")
    small.save(thumbnail, "JPEG", quality=80)
    subprocess.run(["exiftool", "-q", "-overwrite_original", f"-ThumbnailImage<={thumbnail}", str(path)], check=True)
    thumbnail.unlink()


_READ = """
import hashlib, json, os, sys, threading
results = {}
def read(path):
    try:
        with open(path, "rb", buffering=0) as file:
            os.write(1, b"open\\n")
            results[path] = hashlib.sha256(file.readall()).hexdigest()
    except OSError as error:
        results[path] = error.errno
threads = [threading.Thread(target=read, args=(path,)) for path in json.load(sys.stdin)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(results))
"""


def start_readers(paths: list[Path]) -> subprocess.Popen[str]:
    """A process with one thread for each of ``paths`` that reads it whole; returns when all of them are open."""
    process = subprocess.Popen(
        [sys.executable, "-c", _READ], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([os.fspath(path) for path in paths]))
    process.stdin.close()
    for _ in paths:
        assert process.stdout.readline().strip() == "open"
    return process


def results(readers: subprocess.Popen[str], seconds: float = 120.0) -> dict[Path, str | int]:
    """What the readers read, once they are through: for each path the sha256 (hex), or the errno."""
    assert readers.stdout is not None
    readers.wait(seconds)
    with readers.stdout as output:
        return {Path(path): value for path, value in json.loads(output.read()).items()}
