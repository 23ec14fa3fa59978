"""What the worker's jobs mean: the only place where requests meet networks. Imported by the worker when it starts."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from esrfs import formats, reconstruction
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Recipe
from esrfs.compaction import compactor, refine
from esrfs.compaction.compactor import Refine
from esrfs.compaction.outcome import Outcome, Policy, Reason, Verdict
from esrfs.engine import idleness, protocol, room, tiles
from esrfs.engine.errors import DeviceFailedError, JobFailedError
from esrfs.engine.lanes import Cancelled, Running
from esrfs.engine.tiles import Crew
from esrfs.formats.pixels import as_image, shown_as, upright_image
from esrfs.networks import loading
from esrfs.reconstruction import ImplausibleError, Infer, ReconstructionError

Pixels = npt.NDArray[np.uint8]

log = logging.getLogger("esrfs.engine.handler")

_NETWORKS_KEPT = 8
_UPSCALE_MEGAPIXELS = 100.0
"""Of the input of ``esrfs upscale``."""
_ACCELERATOR_TILE = 1024
"""Input pixels along a tile's side where an accelerator runs it: enough work for one launch."""
_UPSCALING = 12
"""Bytes that it takes for each pixel of its output."""
_SMALL_MEGAPIXELS = 16.0
"""Up to which a reconstruction waits for nobody."""
_REBUILDING = 30
"""Bytes that a reconstruction takes for each pixel at most (``tests.peaks``: JPEG 8, lossless WebP 27)."""
_ROOM_OF_A_THREAD = 400_000_000
"""Bytes of memory that there are for each thread, or there are fewer: each holds a tile (100 MB), and a container may
have many processors and little memory."""


class NetworkHandler:
    """See ``worker.Handler``."""

    def __init__(self, device: str, fetch: Callable[[bytes], bytes]) -> None:
        self.device = device
        most = max(2, int(min(room.available(), 1e15) / _ROOM_OF_A_THREAD))
        self._processors = min(len(os.sched_getaffinity(0)), most)
        self.threads = self._processors if device == "cpu" else 1
        self._tile = tiles.TILE if device == "cpu" else _ACCELERATOR_TILE
        self._fetch = fetch
        self._crew = Crew(self.threads)
        self._turns = room.Turns(room.available)
        self._lock = threading.Lock()  # protects:
        self._networks: OrderedDict[bytes, loading.Network] = OrderedDict()

    def rebuild(self, request: protocol.Rebuild, avif: bytes, job: Running) -> tuple[protocol.Rebuilt, bytes]:
        try:
            recipe = recipe_format.decode(request.recipe)
            with self._turn(recipe, job):
                view = reconstruction.rebuild(recipe, avif, self._infer(job))
        except ImplausibleError as error:
            if self.device != "cpu":
                raise DeviceFailedError(str(error)) from error
            raise JobFailedError(str(error)) from error
        except (ValueError, ReconstructionError) as error:
            raise JobFailedError(str(error)) from error
        sha256 = hashlib.sha256(view).digest()
        exact = sha256 == recipe.sha256_view
        if not exact:
            log.info(
                "a view differs from the one first made (%s then, %s now); it is served", recipe.encoder, self.device
            )
        return protocol.Rebuilt(job=request.job, sha256=sha256, exact=exact), view

    def compact(self, request: protocol.Compact, original: bytes, job: Running) -> Outcome:
        try:
            specs = {name: (sha256, self._network(sha256).spec) for name, sha256 in request.networks.items()}
            try:
                networks = compactor.references(specs)
            except ValueError as error:
                raise JobFailedError(str(error)) from error
            return compactor.compact(
                original,
                request.policy,
                networks,
                self._infer(job),
                job.checkpoint,
                reference_key=request.reference_key,
                room=room.available(),
                threads=self._processors,
                refine=self._refine(job, request.policy),
            )
        except (Cancelled, JobFailedError, DeviceFailedError):
            raise
        except MemoryError:
            message = "this machine had too little memory for it just now"
            return Outcome(verdict=Verdict.REFUSED, reason=Reason.NO_MEMORY, message=message)
        except Exception as error:
            # One picture that esrfs stumbles over is no reason to stop compacting the others.
            log.exception("a compaction failed")
            message = f"an error in esrfs: {type(error).__name__}: {error}; please report this with the picture"
            return Outcome(verdict=Verdict.REFUSED, reason=Reason.ERROR, message=message)

    def upscale(self, request: protocol.Upscale, image: bytes, job: Running) -> bytes:
        try:
            pixels = formats.decode(image, _UPSCALE_MEGAPIXELS)
        except formats.Unsupported as error:
            raise JobFailedError(error.message) from error
        scale = self._network(request.network_sha256).scale
        needed, free = _UPSCALING * pixels.shape[0] * pixels.shape[1] * scale**2, room.available()
        if needed > free:
            raise JobFailedError(f"it takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free now")
        infer = partial(self._infer(job), request.network_sha256)
        channels = pixels.shape[2]
        colour = pixels[:, :, : channels - 1] if channels in (2, 4) else pixels
        pixels_large = infer(np.broadcast_to(colour, (*colour.shape[:2], 3)))
        large = as_image(pixels_large, pixels_large.shape[1], pixels_large.shape[0], "RGB")
        del pixels_large
        if colour.shape[2] == 1:
            large = large.convert("L")
        if channels in (2, 4):
            large.putalpha(Image.fromarray(pixels[:, :, -1].copy()).resize(large.size, Image.Resampling.BICUBIC))
        job.checkpoint()
        orientation, profile = shown_as(image)
        large = upright_image(large, orientation)
        out = io.BytesIO()
        space = b"GRAY" if colour.shape[2] == 1 else b"RGB "  # not that of a CMYK picture, which was converted
        large.save(out, "PNG", icc_profile=profile if profile[16:20] == space else None)
        return out.getvalue()

    def _turn(self, recipe: Recipe, job: Running) -> AbstractContextManager[None]:
        if recipe.megapixels <= _SMALL_MEGAPIXELS:
            return contextlib.nullcontext()
        return self._turns.taking(_REBUILDING * 1e6 * recipe.megapixels, job)

    def _infer(self, job: Running) -> Infer:
        def infer(sha256: bytes, pixels: Pixels) -> Pixels:
            network = self._network(sha256)
            with self._troubles():
                return tiles.enlarge(network, pixels, partial(self._crew.spread, job), self._tile)

        return infer

    def _refine(self, job: Running, policy: Policy) -> Refine | None:
        """What refines small pictures, if the policy wants it. Whether the machine is idle is judged when it comes to
        that, by what went on since the job began."""
        if policy.refinement == "off":
            return None
        watch = idleness.Watch() if policy.refinement == "idle" and self.device == "cpu" else None

        def refined(
            sha256: bytes, original: Pixels, small: Pixels, noise: float, seconds: float
        ) -> refine.Refined | None:
            network = self._network(sha256)
            # Others need gigabytes for a tile's gradients, and hours for a photograph.
            if self.device == "cpu" and network.spec.architecture != "SRVGGNetCompact":
                return None
            if watch is not None and not watch.was_idle():
                log.info("the machine is busy, so a photograph is stored unrefined")
                return None
            with self._troubles():
                return refine.refine(
                    original,
                    small,
                    network.differentiable,
                    scale=network.scale,
                    margin=network.margin,
                    noise=noise,
                    seconds=seconds,
                    device=self.device,
                    spread=partial(self._crew.spread, job),
                    checkpoint=job.checkpoint,
                )

        return refined

    @contextlib.contextmanager
    def _troubles(self) -> Iterator[None]:
        """torch's errors become those that the worker knows: of a lost or full accelerator, of memory."""
        try:
            yield
        except RuntimeError as error:
            if self.device != "cpu":
                raise DeviceFailedError(str(error)) from error
            if "allocate memory" in str(error):  # torch has no class of its own for that
                raise MemoryError(str(error)) from error
            raise

    def _network(self, sha256: bytes) -> loading.Network:
        with self._lock:
            network = self._networks.get(sha256)
            if network is not None:
                self._networks.move_to_end(sha256)
                return network
        data = self._fetch(sha256)
        try:
            network = loading.load(data, device=self.device)
        except ValueError as error:
            raise JobFailedError(f"network {sha256.hex()[:16]} can't be used: {error}") from error
        except RuntimeError as error:
            if self.device != "cpu":
                raise DeviceFailedError(str(error)) from error
            raise
        with self._lock:
            self._networks[sha256] = network
            while len(self._networks) > _NETWORKS_KEPT:
                self._networks.popitem(last=False)
        return network


def open_handler(device: str, fetch: Callable[[bytes], bytes]) -> NetworkHandler:
    """``device``: auto, cpu or cuda; auto takes CUDA where it works."""
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        log.warning("there is no CUDA device that torch can use; the CPU is used")
        device = "cpu"
    return NetworkHandler(device, fetch)
