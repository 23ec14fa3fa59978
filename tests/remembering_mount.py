"""``esrfs``, but with the engine's handler of ``remembering_engine``: ``python -m tests.remembering_mount mount …``."""

from __future__ import annotations

import functools

from esrfs.cli.main import main
from esrfs.engine.client import EngineSettings
from esrfs.mount import lifecycle

if __name__ == "__main__":
    lifecycle.EngineSettings = functools.partial(EngineSettings, handler="tests.remembering_engine")  # type: ignore[misc]
    main()
