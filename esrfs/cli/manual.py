"""The manual: a page per command, made from the command line itself. ``make man`` writes it to docs/man.

    python -m esrfs.cli.manual DIRECTORY

The pages are in man(7)'s language. A test checks that those in docs/man are what this makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from esrfs_daemon import main as daemon_command_line

import esrfs
from esrfs.cli import main as command_line
from esrfs.mount import options

_README = Path(esrfs.__file__).parent.parent / "README.md"
_FILES = (
    ("STORE/.esrfs/", "What belongs to a store, its key among it. Keep it with the store."),
    ("STORE/.esrfs/store.toml", "The store's settings: preset, network, patience, refinement, days to undo."),
    ("STORE/.esrfs/rules", "Which files get which preset; see esrfs-policy(1)."),
    ("$XDG_STATE_HOME/esrfs/ID/", "A catalog that can be made anew, and the log of mounts in the background."),
    ("$XDG_CACHE_HOME/esrfs/ID/", "Rebuilt views."),
    ("$XDG_STATE_HOME/esrfs/migration.db", "What `esrfs migrate` and the daemon did."),
    ("$XDG_DATA_HOME/esrfs/weights/", "Networks that were downloaded or added."),
    ("~/.config/esrfs/daemon.toml, /etc/esrfs/daemon.toml", "The daemon's configuration, for users and for root."),
    ("~/.config/esrfs/NAME.conf, /etc/esrfs/NAME.conf", "Store and mountpoint of the service esrfs@NAME."),
    ("$XDG_RUNTIME_DIR/esrfs/", "Sockets by which commands reach mounts."),
)
_SPECIAL = re.compile(r"^[.']", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])(--?\w[\w-]*)")


def pages() -> dict[str, str]:
    """The text of each page by its file's name, such as ``esrfs-mount.1``."""
    group: Any = typer.main.get_command(command_line.make_app())
    top = group.context_class(group, info_name="esrfs", **group.context_settings)
    made = {"esrfs.1": _main_page(group, top)}
    for name, command in group.commands.items():
        made[f"esrfs-{name}.1"] = _command_page(command, _below(top, name, command))
    daemon: Any = typer.main.get_command(daemon_command_line.app)
    context = daemon.context_class(daemon, info_name="esrfs-daemon", **daemon.context_settings)
    made["esrfs-daemon.1"] = _command_page(daemon, context)
    return made


def _below(context: Any, name: str, command: Any) -> Any:
    """The context of a command of the group that ``context`` is of: options that all have come from there."""
    return command.context_class(command, info_name=name, parent=context, **command.context_settings)


def _main_page(group: Any, top: Any) -> str:
    text = [_head("esrfs", group.help), ".SH SYNOPSIS", _synopsis(group, top)]
    text += [".SH DESCRIPTION", *_paragraphs(group.help), ".SH COMMANDS"]
    for name, command in sorted(group.commands.items()):
        text += _item(rf"\fBesrfs\-{_text(name)}\fR(1)", _first_sentence(command.help))
    text += _item(r"\fBesrfs\-daemon\fR(1)", "The migration daemon.")
    text += [".SH OPTIONS", *_parameters(group, top), ".SH EXIT STATUS"]
    table = _README.read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE):
        text += _item(rf"\fB{code}\fR", meaning)
    text.append(".SH FILES")
    for place, what in _FILES:
        text += _item(rf"\fI{_text(place)}\fR", what)
    return "\n".join(text) + "\n"


def _command_page(command: Any, context: Any) -> str:
    path = context.command_path
    below = [(each, _below(context, name, each)) for name, each in getattr(command, "commands", {}).items()]
    text = [_head(path.replace(" ", "-"), command.help), ".SH SYNOPSIS"]
    text += ["\n.PP\n".join(_synopsis(*each) for each in below or [(command, context)])]
    text += [".SH DESCRIPTION", *_paragraphs(command.help)]
    if below:
        text.append(".SH COMMANDS")
        for each, inside in below:
            text += [f".SS {_text(inside.command_path)}", *_paragraphs(each.help), *_parameters(each, inside)]
    text += [".SH OPTIONS", *_parameters(command, context)]
    if path == "esrfs mount":
        text.append(".SH MOUNT OPTIONS")
        for name, meaning in options.OWN.items():
            text += _item(rf"\fB{_text(name)}\fR", meaning)
        text += [".PP", f"Also those of FUSE and fstab: {_text(', '.join(options.KNOWN_ELSEWHERE))}."]
    text += [".SH SEE ALSO", r"\fBesrfs\fR(1)"]
    return "\n".join(text) + "\n"


def _head(name: str, help_text: str) -> str:
    title, about = _text(name.upper()), _text(_first_sentence(help_text).rstrip("."))
    return f'.TH "{title}" 1 "" "esrfs {esrfs.__version__}" "esrfs"\n.SH NAME\n{_text(name)} \\- {about}'


def _synopsis(command: Any, context: Any) -> str:
    pieces = " ".join(command.collect_usage_pieces(context))
    pieces = re.sub("[{}]", "", pieces).replace("…...", "…")
    return rf"\fB{_text(context.command_path)}\fR {_text(pieces)}"


def _parameters(command: Any, context: Any) -> Iterator[str]:
    """Arguments and options, each with its help."""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            name, about = record
            if parameter.param_type_name == "argument" or name.endswith(" <bool>"):
                name = re.sub(r" <.*>$", "", name)
            yield from _item(_OPTION.sub(r"\\fB\1\\fR", _escape(name)).replace("-", r"\-"), about)


def _item(name: str, about: str) -> list[str]:
    return [".TP", name, _text(about)]


def _paragraphs(text: str) -> list[str]:
    return "\n.PP\n".join(_text(paragraph) for paragraph in text.split("\n\n")).split("\n")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text)[0]


def _escape(text: str) -> str:
    return _SPECIAL.sub(lambda found: rf"\&{found[0]}", text.replace("\\", r"\e"))


def _text(text: str) -> str:
    """With man(7)'s own characters escaped, and what stands in backquotes in bold type."""
    return re.sub(r"`([^`]+)`", r"\\fB\1\\fR", _escape(" ".join(text.split()))).replace("-", r"\-")


def main(directory: Path) -> None:
    made = pages()
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.1"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
