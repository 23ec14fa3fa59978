"""Rules: which files are kept under another policy than the store's own. ``.esrfs/rules``, a text file for people.

One rule a line: a pattern as in ``.gitignore``, blanks, and what to do. The last rule that matches a file counts; what
no rule matches is kept under the store's own policy (``preset`` in store.toml)::

    # pattern           what
    *.png               never
    Scans/              lossless
    /Holidays/**        balanced
    /Holidays/best/     faithful

``never``: the file stays as it is. ``lossless``: only if it comes back bit for bit. Else the name of a preset. A
pattern without a slash (but at its end) matches names in any folder, one that ends in a slash folders with all that is
in them; ``*`` stands for anything but a slash, ``**`` for any folders. Upper and lower case are the same. Empty lines
and lines that begin with ``#`` say nothing.

The file is looked at again whenever it has changed; what is stored small already stays so (`esrfs restore` brings
originals back). While a line of it can't be understood, nothing is compacted.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

import msgspec

from esrfs.compaction.outcome import CHOICES, NEVER, Policy
from esrfs.store.errors import Problem, StoreError
from esrfs.store.layout import RESERVED, Store

RULES = "rules"
_LARGEST = 1 << 20
"""Characters of the file that are read."""


@dataclass(frozen=True)
class Rule:
    line: int
    """Its number in the file, from 1."""
    pattern: str
    choice: str
    """A preset, ``lossless`` or ``never``."""


@dataclass(frozen=True)
class Decision:
    """How a file is to be kept."""

    choice: str
    """A preset, ``lossless`` or ``never``."""
    rule: Rule | None
    """None: the store's own policy."""


Stamp = tuple[int, ...] | None


@dataclass(eq=False)
class Rules:
    """The rules of one store, read anew when their file changes. Threads may share it."""

    store: Store
    _known: tuple[Stamp, list[Rule]] = (None, [])  # replaced as a whole

    @property
    def stamp(self) -> Stamp:
        """Another one after each change of the file; cheap."""
        return _stamp(self.store)

    def decide(self, path: str) -> Decision:
        """For the file at ``path`` in the store. Raises StoreError while the rules can't be understood, OSError."""
        stamp, rules = self._known
        if stamp != self.stamp:
            stamp = self.stamp
            rules = parse(_read(self.store), _where(self.store)) if stamp else []
            self._known = stamp, rules
        rule = next((rule for rule in reversed(rules) if _matches(rule.pattern, path)), None)
        return Decision(rule.choice if rule else self.store.config.policy.preset, rule)

    def policy(self, path: str) -> Policy | None:
        """What to compact the file at ``path`` under; None: never. Raises as :meth:`decide`."""
        choice = self.decide(path).choice
        return None if choice == NEVER else msgspec.structs.replace(self.store.config.policy, preset=choice)


def parse(text: str, where: str) -> list[Rule]:
    """The rules in ``text``, the content of the file ``where``. Raises StoreError."""
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        pattern, choice = line.strip().rpartition(words[-1])[0].strip(), words[-1]
        if not pattern or choice not in (*CHOICES, NEVER):
            message = f"expected a pattern and then one of {', '.join((*CHOICES, NEVER))}, not {line.strip()!r}"
        elif pattern.startswith("!"):
            message = "a pattern can't be turned round with '!'; let a later line say what shall hold"
        else:
            rules.append(Rule(number, pattern, choice))
            continue
        raise StoreError(
            f"{where}, line {number}: {message}. Nothing is compacted until it is put right.", Problem.DAMAGED
        )
    return rules


def _matches(pattern: str, path: str) -> bool:
    import pathspec  # noqa: PLC0415 (only stores with rules need it)

    return pathspec.GitIgnoreSpec.from_lines([pattern.lower()]).match_file(path.lower())


def _stamp(store: Store) -> Stamp:
    try:
        st = os.stat(RULES, dir_fd=store.meta_fd)
    except FileNotFoundError:
        return None
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns


def _where(store: Store) -> str:
    return os.path.join(store.path, RESERVED, RULES)


def _read(store: Store) -> str:
    """Raises StoreError for what is no file, OSError."""
    descriptor = os.open(RULES, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=store.meta_fd)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{_where(store)} is no file. Nothing is compacted until it is one, or gone.", Problem.DAMAGED)
    with os.fdopen(descriptor, encoding="utf-8", errors="surrogateescape") as file:
        return file.read(_LARGEST)
