"""The sampling of one image as other threads see it: previews on request, and steps at which it pauses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moesr.runtime.engine.preview_map import PreviewMap
from moesr.runtime.errors import UsageError
from moesr.runtime.images import latent_preview
from moesr.runtime.images.planes import to_unit
from moesr.runtime.loop.tile_layout import TileLayout

PREVIEW_PX = 512
"""The longest side of a preview. The latent of a larger image is reduced by a whole number."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A predicted clean latent [C, h, w], and what is needed to draw it: see `latent_preview.picture`."""

    clean: np.ndarray
    lr: np.ndarray | None
    colors: PreviewMap | None

    def picture(self) -> np.ndarray | None:
        """Draw the preview, uint8 [h, w, 3]; None if there is neither a map nor an LR image on the host."""
        if self.colors is None:
            return latent_preview.picture(self.clean, self.lr)
        weights, bias = np.array(self.colors.weights), np.array(self.colors.bias)
        return latent_preview.picture(self.clean, self.lr, weights, bias, adds_lr=self.colors.adds_lr)


@dataclass(eq=False)
class SamplingStep:
    """A sampling step that has just ended. The image waits until the callback that gets it returns.

    `step` of `steps` counts from 0, `t` is the timestep of the step, and `image` the position of the image
    among those of the call. `latents` is the latent after the step and `clean` the clean latent that it
    predicts, both float32 [C, h, w] on the latent canvas. Sampling goes on with `latents` as the callback
    leaves them; if it sets `stopped`, the remaining steps are left out, and these latents are decoded.
    """

    step: int
    steps: int
    t: float
    latents: np.ndarray
    clean: np.ndarray
    image: int = 0
    stopped: bool = False
    snapshot: Snapshot | None = field(default=None, repr=False)

    def preview(self) -> np.ndarray | None:
        """Draw the predicted image in small, uint8 [h, w, 3], one pixel per latent pixel, at most 512.

        It is computed by this call. None for an image in a GPU's memory if the engine has no map to colors.
        """
        return self.snapshot.picture() if self.snapshot else None


OnStep = Callable[[SamplingStep], None]
"""A function that is called in the caller's thread after every sampling step."""


class Watch:
    """Requests of other threads about one image's sampling, and the answers of the worker's thread.

    With `every_step` the image pauses after each step, until `step` has been shown and `release` called.
    """

    def __init__(self, *, every_step: bool = False) -> None:
        self.every_step = every_step
        self.paused = False
        self.step: SamplingStep | None = None  # of the pause, until it was shown
        self._stopped = False  # by a callback
        self._latents: np.ndarray | None = None  # with which sampling goes on after a pause
        self.asked = False  # whether a preview was asked for since the newest one was made
        self._newest: Snapshot | None = None
        self._layout: TileLayout | None = None
        self._source: np.ndarray | None = None
        self._lr: np.ndarray | None = None

    # Any thread.

    def ask(self) -> np.ndarray | None:
        """Draw the newest snapshot, if there is one, and ask for the next one."""
        self.asked = True
        newest = self._newest
        return newest.picture() if newest else None

    def release(self) -> None:
        """Let the image go on after its step was shown, with the latents as the callback left them.

        UsageError is raised if they have another shape.
        """
        step, self.step = self.step, None
        if step:
            latents = np.asarray(step.latents, np.float32)
            if latents.shape != step.clean.shape:
                raise UsageError(f"latents have the shape {latents.shape}, expected {step.clean.shape}")
            self._latents, self._stopped = latents, step.stopped
        self.paused = False

    def forget(self) -> None:
        """Drop all arrays when the image has ended."""
        self._newest = self.step = self._latents = None
        self._layout = self._source = self._lr = None

    # The worker's thread.

    @property
    def wanted(self) -> bool:
        """Whether the prediction of the present step is to be shown."""
        return self._layout is not None and (self.asked or self.every_step)

    def look_at(self, layout: TileLayout, lr: np.ndarray) -> None:
        """Begin with an image: `lr` is the input at output size [H, W, 3], empty if it is not on the host."""
        self._layout, self._source = layout, lr

    def show(self, z: np.ndarray, out: np.ndarray, c_z: float, c_out: float) -> None:
        """Keep the prediction c_z * z + c_out * out [C, h, w] as the newest one, in small."""
        assert self._layout is not None
        self.asked = False
        height, width = (-(-side // self._layout.manifest.latent_factor) for side in self._layout.frame.image)
        size = min(-(-max(height, width) // PREVIEW_PX), *z.shape[1:])
        rows, columns = slice(0, max(height, size)), slice(0, max(width, size))
        small = [latent_preview.block_means(array[:, rows, columns], size) for array in (z, out)]
        if self._lr is None:
            self._lr = self._small_lr(rows, columns, size)
        clean = np.float32(c_z) * small[0] + np.float32(c_out) * small[1]
        self._newest = Snapshot(clean, self._lr, self._layout.manifest.preview)

    def pause(self, step: SamplingStep) -> None:
        """Let the image wait until a callback has seen this step."""
        step.snapshot = self._newest
        self.paused = True
        self.step = step  # last, as other threads may release the image as soon as they see it

    def take_latents(self) -> np.ndarray | None:
        """Return, once after a pause, the latents with which sampling goes on."""
        found, self._latents = self._latents, None
        return found

    def take_stop(self) -> bool:
        """Return True, once, if a callback stopped the sampling."""
        found, self._stopped = self._stopped, False
        return found

    def _small_lr(self, rows: slice, columns: slice, size: int) -> np.ndarray | None:
        """Return the LR image in the size of a snapshot, in [-1, 1], from the middles of latent pixels."""
        if self._source is None or not self._source.size or self._layout is None:
            return None
        factor = self._layout.manifest.latent_factor
        pixels = self._source[factor // 2 :: factor, factor // 2 :: factor][rows, columns]
        planes = np.ascontiguousarray(pixels).transpose(2, 0, 1)
        self._source = None
        small = latent_preview.block_means(to_unit(planes, np.empty(planes.shape, np.float32)), size)
        return np.ascontiguousarray(small.transpose(1, 2, 0))
