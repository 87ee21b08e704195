"""The Python interface to the autoencoder of a text-to-image model: latents to images, and back.

from moesr.runtime.autoencoder import Autoencoder

with Autoencoder("engine") as vae:
    image = vae.decode(latent)
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moesr.runtime.engine.graph_io import DECODER, ENCODER, UNREFINED
from moesr.runtime.engine.hub_names import origin_of
from moesr.runtime.engine.manifest import AutoencoderManifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import InputError, UsageError
from moesr.runtime.loop.admission import Reservation
from moesr.runtime.loop.coding import Coding, ImageEncoding, LatentDecoding
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.opened import OpenedEngine

Progress = Callable[[float, str], Any]
"""Is called with the fraction of the work that is done, and the name of the stage."""

FORKED = "this Autoencoder was opened before the process was forked; open one in each process"


class Autoencoder:
    """Encodes and decodes with one engine. Threads may share it; processes may not.

    Latents are float32 arrays [C, h, w] as the text-to-image model has them: those of the autoencoder times
    `scaling_factor`. Images are float32 arrays [3, f h, f w] in about [-1, 1], where f is `factor`. A latent
    of exactly one tile of the engine is decoded whole. A larger one is decoded in tiles that overlap and are
    blended, and a smaller one is extended by reflection, because norms, attention and filter see a tile.
    """

    def __init__(self, engine: Path | str, **options: Any) -> None:
        """Open an engine directory; the options are those of `Upscaler`. Raises EngineError or UsageError."""
        self._opened = OpenedEngine(engine, read=_read, **options)
        manifest = self._opened.manifest
        assert isinstance(manifest, AutoencoderManifest)
        self.directory, self.manifest, self.backend = self._opened.directory, manifest, self._opened.backend
        self._worker, self._admission = self._opened.worker, self._opened.admission
        self._room = threading.Condition()
        self._process = os.getpid()
        self._release = weakref.finalize(self, self._worker.close)

    def __enter__(self) -> Autoencoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs. Further calls end with UsageError."""
        if self._release.alive:
            self._opened.keep_costs()
        self._release()

    @property
    def channels(self) -> int:
        """The number of channels of a latent."""
        return self.manifest.latent_channels

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return self.manifest.latent_factor

    @property
    def scaling_factor(self) -> float:
        """The factor between the autoencoder's latents and those of the text-to-image model."""
        return self.manifest.latent_scale

    @property
    def origin(self) -> str:
        """The repository and commit of an engine from the Hugging Face hub; "" for another engine."""
        return origin_of(self.directory)

    @property
    def encodes(self) -> bool:
        """True if the engine has an encoder."""
        return ENCODER in self.manifest.graphs

    @property
    def refines(self) -> bool:
        """True if the decoder has a refinement network, which `decode` can leave out."""
        return UNREFINED in self.manifest.graphs

    def layout(self, height: int, width: int) -> TileLayout:
        """Return the tiles of an image of so many pixels."""
        return TileLayout(self.manifest, height, width)

    def decode(
        self,
        latent: np.ndarray,
        *,
        scaled: bool = True,
        refined: bool = True,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Decode a latent [C, h, w] to an image [3, f h, f w].

        With `scaled` False the latent has been divided by the scaling factor before. With `refined` False the
        refinement network is left out. Raises InputError for another shape and for values that are not
        finite, UsageError if the engine has no refinement network to leave out or is closed,
        MemoryLimitError, and EngineError.
        """
        if not refined and not self.refines:
            raise UsageError(f"{self.manifest.name} has no refinement network; leave out refined=False")
        values = checked_latent(latent, self.channels)
        if not scaled:
            values = values * np.float32(self.scaling_factor)
        height, width = (side * self.factor for side in values.shape[1:])
        work = LatentDecoding(self.layout(height, width), values, DECODER if refined else UNREFINED)
        return self._run(work, progress)[:, :height, :width]

    def encode(
        self, image: np.ndarray, *, seed: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Encode an image [3, H, W] in [-1, 1], whose sides are multiples of `factor`, to a latent.

        It is the mean of the posterior or, with a `seed`, a sample. Raises InputError, UsageError if the
        engine has no encoder or is closed, MemoryLimitError, and EngineError.
        """
        if not self.encodes:
            raise UsageError(
                f"{self.manifest.name} has no encoder: its weights were those of the decoder alone"
            )
        values = np.asarray(image, np.float32)
        sides = values.shape[1:]
        if values.ndim != 3 or len(values) != 3 or any(s < 1 or s % self.factor for s in sides):
            raise InputError(
                f"got an image of shape {values.shape}, expected [3, H, W] with sides that are multiples of "
                f"{self.factor}"
            )
        if not np.isfinite(values).all():
            raise InputError("the image has values that are not finite")
        height, width = sides
        result = self._run(ImageEncoding(self.layout(height, width), values, seed), progress)
        return result[:, : height // self.factor, : width // self.factor]

    def _run(self, work: Coding, progress: Progress | None) -> np.ndarray:
        """Reserve memory, run the work, and return its result; an interrupt ends the work."""
        if os.getpid() != self._process:
            raise UsageError(FORKED)
        room = self._reserved(work.layout)
        try:
            self._worker.submit(work)
            self._wait(work, progress)
        except BaseException:
            self._worker.cancel(work)
            raise
        finally:
            with self._room:
                room.release()
                self._room.notify_all()
        if work.error:
            raise work.error
        self._admission.warm = True
        assert work.result is not None
        return work.result

    def _reserved(self, layout: TileLayout) -> Reservation:
        """Wait for memory; MemoryLimitError if the image would not fit with nothing else in flight."""
        with self._room:
            while not (room := self._admission.reserve(layout, spools=False)):
                self._room.wait(0.5)
            return room

    def _wait(self, work: Coding, progress: Progress | None) -> None:
        """Wait until the work is done, and report its progress meanwhile."""
        whole, seen = work.planned.total(), -1
        while True:
            with self._worker.ticked:
                while not work.done and (work.ran.total() == seen or progress is None):
                    self._worker.ticked.wait()
                done, seen = work.done, work.ran.total()
            if progress:
                progress(seen / whole, work.stage)
            if done:
                return


def checked_latent(latent: np.ndarray, channels: int) -> np.ndarray:
    """Return a latent as float32 [C, h, w]; InputError for another shape or values that are not finite."""
    values = np.asarray(latent)
    if values.ndim != 3 or values.shape[0] != channels or 0 in values.shape or values.dtype.kind != "f":
        raise InputError(
            f"got a latent of shape {list(values.shape)} and type {values.dtype}, expected floating-point "
            f"values of shape [{channels}, h, w]"
        )
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError("the latent has NaN or infinite values")
    return values


def _read(directory: Path, verify: bool = True) -> Any:
    return read_manifest(directory, verify, kinds=("autoencoder",))
