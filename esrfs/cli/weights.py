"""``weights``: networks that are here or can be downloaded. ``upscale``: use one on a single image."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from esrfs import whole
from esrfs.cli import show
from esrfs.cli.show import CommandError
from esrfs.engine.client import Device, Engine, EngineError, EngineSettings
from esrfs.exit_codes import ExitCode
from esrfs.networks import registry
from esrfs.networks.registry import WeightsError

weights = typer.Typer(no_args_is_help=True, help="Networks: what is here, official ones, your own.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(weights, name="weights")
    app.command()(upscale)


@weights.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Networks that are here, and official ones that `pull` can fetch."""
    rows = []
    for listed in registry.listing():
        scale = listed.spec.scale if listed.spec else listed.official.scale if listed.official else None
        reduction = listed.spec.arguments.get("reduction") if listed.spec else None
        licence = listed.spec.licence if listed.spec else listed.official.licence if listed.official else ""
        rows.append(
            {
                "name": listed.name,
                "origin": listed.origin,
                "here": listed.path is not None,
                "path": str(listed.path) if listed.path else None,
                "bytes": listed.bytes,
                "scale": scale,
                "reduction": reduction,
                "texture": listed.spec.texture if listed.spec else None,
                "licence": licence,
            }
        )
    if as_json:
        show.as_json(rows)
        return
    show.table(
        ["name", "scale", "size", "licence", "from", "here"],
        [
            [
                str(row["name"]),
                (f"÷{row['reduction']}" if row["reduction"] else f"×{row['scale']}" if row["scale"] else "")
                + (" texture" if row["texture"] else ""),
                show.size(row["bytes"]) if isinstance(row["bytes"], int) else "",
                str(row["licence"]),
                str(row["origin"]),
                "yes" if row["here"] else "no",
            ]
            for row in rows
        ],
        right=[2],
    )
    if not all(row["here"] for row in rows):
        show.note("those that are not here: esrfs weights pull NAME")


@weights.command()
def pull(names: Annotated[list[str], typer.Argument(metavar="NAME…", help="See `esrfs weights list`.")]) -> None:
    """Download official weights; their SHA-256 is checked. An interrupted download is continued."""
    try:
        for name in names:
            with show.progress(f"Downloading {name}", in_bytes=True) as advance:
                path = registry.pull(name, progress=lambda done, total: advance(done, total or 0, ""))
            show.line(str(path))
    except WeightsError as error:
        raise CommandError(str(error), ExitCode.NETWORK) from error


@weights.command()
def add(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="safetensors of esrfs, or an official-style .pth.")],
    name: Annotated[str, typer.Option(help="What to call it; the file's own name if left out.")] = "",
) -> None:
    """Copy a network of your own to where esrfs finds it."""
    try:
        registry.check_kind(file)
        from esrfs.networks import loading  # noqa: PLC0415 (torch, for this command only)

        try:
            loading.load(file.read_bytes(), name=file.stem)
        except ValueError as error:
            raise WeightsError(f"{file} is no network that esrfs can run: {error}") from error
        show.line(str(registry.add(file, name)))
    except WeightsError as error:
        raise CommandError(str(error), ExitCode.NETWORK) from error


@weights.command()
def interpolate(
    fidelity: Annotated[str, typer.Argument(metavar="A", help="The faithful network: its name or file.")],
    adversarial: Annotated[str, typer.Argument(metavar="B", help="Its adversarial partner.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="C", help="A safetensors file, named as the network.")],
    texture: Annotated[float, typer.Option(min=0, max=1, help="0 is A, 1 is B.")] = 0.5,
) -> None:
    """Mix two networks into one between them: sharper than A, more faithful than B."""
    if out.suffix.lower() != ".safetensors":
        raise CommandError(f"{out}: the result is a safetensors file; end its name in .safetensors", ExitCode.USAGE)
    from esrfs.networks.interpolation import interpolate as mixed  # noqa: PLC0415 (torch, for this command only)

    try:
        first, second = (registry.file_or_name(each).read_bytes() for each in (fidelity, adversarial))
        data = mixed(first, second, texture, out.stem)
    except (ValueError, WeightsError) as error:
        raise CommandError(str(error), ExitCode.NETWORK) from error
    whole.write(out, data)
    show.line(f"{out}; `esrfs weights add {out}` makes it known by the name {out.stem}")


def upscale(
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="A PNG file.")],
    network: Annotated[str, typer.Option(help="See `esrfs weights list`.")] = "lite-x2",
    device: Annotated[Device, typer.Option(help="Where the network runs.")] = "auto",
) -> None:
    """Enlarge one image with a network; needs no store."""
    if out.suffix.lower() != ".png":
        raise CommandError(f"{out}: the result is a PNG file; end its name in .png", ExitCode.USAGE)
    if not out.parent.is_dir():
        raise CommandError(f"{out.parent} is no folder; nothing was done", ExitCode.FAILED)
    try:
        data = registry.enlarger(network).read_bytes()
    except WeightsError as error:
        raise CommandError(str(error), ExitCode.NETWORK) from error
    source = image.read_bytes()
    engine = Engine(EngineSettings(device=device), {hashlib.sha256(data).digest(): data}.__getitem__)
    try:
        with show.progress(f"Enlarging {image.name}"):
            enlarged = engine.upscale(source, hashlib.sha256(data).digest())
    except EngineError as error:
        raise CommandError(f"{image}: {error}", ExitCode.ENGINE) from error
    finally:
        engine.close()
    whole.write(out, enlarged)
