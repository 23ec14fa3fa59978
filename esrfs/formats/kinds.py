"""The kinds of picture that esrfs compacts: the one list of them, for every process (no numpy, no Pillow).

To add a kind: here, a coding in ``blob/recipe.py`` whose tag is the kind, a module ``formats/KIND.py`` with ``split``
and ``encode_scan``, and that module in ``formats``.
"""

from __future__ import annotations

COMPACTED = {"jpeg": "JPEG", "png": "PNG", "webp": "WebP", "tiff": "TIFF", "bmp": "BMP"}
"""Each kind, as ``identify`` and the recipe's coding name it, and its name for people."""


def in_words() -> str:
    """``JPEG, PNG and WebP``."""
    names = list(COMPACTED.values())
    return f"{', '.join(names[:-1])} and {names[-1]}"
