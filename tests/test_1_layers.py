"""Imports point down the list of layers only, and processes that must stay small never import torch or numpy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "esrfs"
DAEMON = PACKAGE.parent / "daemon" / "esrfs_daemon"

# Top first: a module may import from its own layer and from those below.
LAYERS = [
    "cli", "evaluate", "mount", "vfs", "upkeep", "cache", "store", "engine", "compaction", "reconstruction",
    "formats", "blob", "networks", "metrics",
]  # fmt: skip
# Importable by all, for they import nothing but each other: values that travel between layers, what every layer needs.
GROUND = {
    "esrfs", "esrfs.config", "esrfs.faults", "esrfs.exit_codes", "esrfs.control", "esrfs.journal", "esrfs.prometheus",
    "esrfs.whole",
    "esrfs.blob", "esrfs.blob.dictionary", "esrfs.blob.recipe", "esrfs.compaction", "esrfs.compaction.outcome",
}  # fmt: skip
# Beside the list: a developer's program, which may import everything.
FREE = {"train"}
HEAVY = {"torch", "numpy"}
# What runs in the mount's process or in a command's: no torch, no numpy (start-up, memory, decoding elsewhere only).
LIGHT_LAYERS = {"cli", "mount", "vfs", "upkeep", "cache", "store"}
LIGHT_MODULES = {"esrfs.engine.client", "esrfs.engine.protocol", "esrfs.networks.registry", "esrfs.blob.container"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(module: str) -> set[str]:
    """Modules of esrfs that ``module`` imports, wherever in its text (also inside functions)."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name for name in found if name == "esrfs" or name.startswith("esrfs.")}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    own = layer(module)
    if own in FREE:
        return
    for name in imported(module) - GROUND:
        assert module not in GROUND, f"{module} is for all layers and so may not import {name}"
        assert name in MODULES, f"{module} imports {name}, which does not exist"
        assert layer(name) in LAYERS, f"{module} imports {name}: it has no place in the list of layers"
        assert own in LAYERS, f"{module} has no place in the list of layers"
        assert LAYERS.index(layer(name)) >= LAYERS.index(own), f"{module} imports {name}, which lies above it"


def test_only_the_adapter_imports_the_fuse_binding():
    for module, path in MODULES.items():
        if layer(module) != "mount":
            assert "import mfusepy" not in path.read_text() and "from mfusepy" not in path.read_text(), module


def test_the_daemon_uses_a_mount_as_any_program_would():
    """Of the store it takes system calls and looks at folders; it opens none. A blob it knows, so as to leave it."""
    allowed = {"esrfs.store.linux", "esrfs.store.metadata", "esrfs.store.beneath", "esrfs.store.layout",
               "esrfs.store.initialise", "esrfs.store.errors", "esrfs.upkeep.compact", "esrfs.journal",
               "esrfs.prometheus", "esrfs.blob.container"}  # fmt: skip
    for path in sorted(DAEMON.glob("*.py")):
        text = path.read_text()
        found = set(re.findall(r"^\s*(?:from|import) (esrfs(?:\.\w+)+)", text, re.MULTILINE))
        for package, names in re.findall(r"^from (esrfs(?:\.store|\.upkeep)?) import (.+)", text, re.MULTILINE):
            found = (found - {package}) | {f"{package}.{name.strip()}" for name in names.split(",")}
        assert found - GROUND <= allowed, path.name
        assert "open_store" not in text, path.name


def test_light_processes_import_no_torch_and_no_numpy():
    light = [name for name in MODULES if layer(name) in LIGHT_LAYERS or name in LIGHT_MODULES | GROUND]
    light = [name for name in light if not name.endswith("__main__")]
    light += [f"esrfs_daemon.{path.stem}" for path in sorted(DAEMON.glob("*.py")) if not path.stem.startswith("__")]
    script = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
    heavy = {HEAVY!r} & set(sys.modules)
    if heavy:
        raise SystemExit(f"importing {{name}} imported {{heavy}}")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
