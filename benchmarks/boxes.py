"""What a blob stores beside its picture, and what that was when recipes were compressed without a dictionary.

    python -m benchmarks.boxes BLOB…

A blob is a compacted file as it lies in its store's directory, not in the mount.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

from esrfs.blob import container
from esrfs.blob import recipe as recipe_format


def main() -> None:
    print("| blob | kind | picture | recipe | beside it, zlib | with the dictionary |")
    print("|---|---|---|---|---|---|")
    for path in map(Path, sys.argv[1:]):
        blob = container.unpack(path.read_bytes())
        now = len(container.pack(blob.avif, blob.recipe_bytes, bytes(16), bytes(32))) - len(blob.avif)
        unpadded = container.SMALLEST_BOX + len(zlib.compress(blob.recipe_bytes, 9))
        before = unpadded + container.padding(len(blob.avif) + unpadded)
        sizes = (len(blob.avif), len(blob.recipe_bytes), before, now)
        kind = recipe_format.kind_of(blob.recipe.coding)
        print(f"| {path.name} | {kind} | {' | '.join(f'{size:,}' for size in sizes)} |")


if __name__ == "__main__":
    main()
