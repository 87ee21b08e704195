"""The work on an image before and after the sampler: resizing, padding, color correction, cropping."""

from __future__ import annotations

import numpy as np

from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.images import wrapping
from moesr.runtime.images.color import fix_color
from moesr.runtime.images.planes import Planes, join, to_unit
from moesr.runtime.images.resize import Resizer, imresize, reflect_pad
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout


def prepare(layout: TileLayout, planes: Planes, settings: Settings) -> Job:
    """Resize the image to output size and to the latent grid, and make a job of both.

    The job shares no memory with `planes`.
    """
    if layout.wraps:
        source, lr = _wrapped(layout, planes.rgb)
    else:
        source, enlarged = enlarging(layout, planes.rgb)
        lr = reflect_pad(enlarged.rows(0, enlarged.height), *layout.frame.canvas, axes=(0, 1))[0]
    condition = condition_of(layout, lr if source is None else source, planes.rgb)
    return Job(layout, _apart(lr, planes.rgb), condition, settings)


def _wrapped(layout: TileLayout, rgb: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the input of a texture that wraps, if it fits the latent grid, and the enlarged input."""
    m = layout.manifest
    lr = wrapping.resize(_deep(m, rgb), *layout.frame.canvas, convention=m.framing.resize)
    return rgb if layout.latent == rgb.shape[:2] else None, lr


def enlarging(layout: TileLayout, rgb: np.ndarray) -> tuple[np.ndarray | None, Resizer]:
    """Return the padded input, or None, and the rows of the input enlarged to output size.

    For engines that pad in LR pixels these rows fill the canvas. Other engines have no padded input, and
    the rows still have to be extended to the canvas by reflection.
    """
    m, frame = layout.manifest, layout.frame
    if m.framing.small == "pad":
        rows, columns = frame.canvas
        source, _ = reflect_pad(rgb, rows // m.scale, columns // m.scale, axes=(0, 1))
        return source, Resizer(source, *frame.canvas, convention=m.framing.resize)
    return None, Resizer(_deep(m, rgb), *frame.image, convention=m.framing.resize)


def enlarged_type(manifest: Manifest, dtype: np.dtype) -> np.dtype:
    """Return the type of the enlarged input of an image of this type."""
    deep = manifest.framing.small != "pad" and manifest.framing.resize != "matlab"
    return np.dtype(np.uint16) if deep else dtype


def condition_of(layout: TileLayout, source: np.ndarray, rgb: np.ndarray) -> np.ndarray | None:
    """Return `source` on the latent grid, in memory of its own; None if an encoder makes the condition."""
    if layout.manifest.condition != "image":
        return None
    resize = wrapping.resize if layout.wraps else imresize
    small = source if source.shape[:2] == layout.latent else resize(source, *layout.latent)
    return _apart(small, rgb)


def _apart(array: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the array, copied if it may share memory with the other."""
    return array.copy() if np.may_share_memory(array, other) else array


def _deep(manifest: Manifest, rgb: np.ndarray) -> np.ndarray:
    """Return the image with 16 bits per channel if the model was trained on values not rounded to 8 bits."""
    if manifest.framing.resize == "matlab" or rgb.dtype == np.uint16:
        return rgb
    return rgb.astype(np.uint16) * np.uint16(257)


def finish(planes: Planes, job: Job) -> np.ndarray:
    """Crop the job's result, correct its colors, and return it in the dtype and channels of the input.

    An image that was enlarged to fill a tile is reduced to `scale` times its size after the correction.
    """
    assert job.image is not None
    height, width = job.layout.result
    rows, columns = job.layout.frame.image
    top = np.iinfo(planes.rgb.dtype).max
    rgb = np.empty((height, width, 3), planes.rgb.dtype)
    style = np.empty((rows, columns), np.float32)
    for channel in range(3):  # one plane at a time: a plane of an 8K image takes 130 MB
        plane = job.image[channel, :rows, :columns]
        to_unit(job.lr[:rows, :columns, channel], style)
        if job.layout.wraps:
            plane = wrapping.fix_color(plane, style, job.settings.color_fix)
        else:
            fix_color(plane, style, job.settings.color_fix, out=plane)
        if (rows, columns) != (height, width):
            plane = imresize(plane, height, width)
        rgb[..., channel] = to_integers(plane, top)
    resize = wrapping.resize if job.layout.wraps else imresize
    alpha = None if planes.alpha is None else resize(planes.alpha, height, width)
    return join(rgb, alpha, planes)


def to_integers(values: np.ndarray, top: int) -> np.ndarray:
    """Map values in [-1, 1] to whole numbers of 0 to `top`, in place; returns the array."""
    np.add(values, np.float32(1.0), out=values)
    np.multiply(values, np.float32(top / 2.0), out=values)
    np.rint(values, out=values)
    return np.clip(values, 0, top, out=values)
