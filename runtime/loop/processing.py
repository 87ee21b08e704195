"""The work on an image before and after the sampler: resizing, padding, color correction, cropping."""

from __future__ import annotations

import numpy as np

from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.images import wrapping
from moesr.runtime.images.color import fix_color
from moesr.runtime.images.planes import Planes, join, to_unit
from moesr.runtime.images.resize import imresize, reflect_pad
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout


def prepare(layout: TileLayout, planes: Planes, settings: Settings) -> Job:
    """Resize the image to output size and to the latent grid, and make a job of both.

    The job shares no memory with `planes`.
    """
    m, frame = layout.manifest, layout.frame
    if layout.wraps:
        source = lr = wrapping.resize(_deep(m, planes.rgb), *frame.canvas, convention=m.framing.resize)
        if layout.latent == planes.rgb.shape[:2]:
            source = planes.rgb
    elif m.framing.small == "pad":
        rows, columns = frame.canvas
        source, _ = reflect_pad(planes.rgb, rows // m.scale, columns // m.scale, axes=(0, 1))
        lr = imresize(source, *frame.canvas, convention=m.framing.resize)
    else:
        enlarged = imresize(_deep(m, planes.rgb), *frame.image, convention=m.framing.resize)
        source = lr = reflect_pad(enlarged, *frame.canvas, axes=(0, 1))[0]
    condition = None
    if m.condition == "image":
        resize = wrapping.resize if layout.wraps else imresize
        condition = source if source.shape[:2] == layout.latent else resize(source, *layout.latent)
        condition = _apart(condition, planes.rgb)
    return Job(layout, _apart(lr, planes.rgb), condition, settings)


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
        np.add(plane, np.float32(1.0), out=plane)
        np.multiply(plane, np.float32(top / 2.0), out=plane)
        np.rint(plane, out=plane)
        rgb[..., channel] = np.clip(plane, 0, top, out=plane)
    resize = wrapping.resize if job.layout.wraps else imresize
    alpha = None if planes.alpha is None else resize(planes.alpha, height, width)
    return join(rgb, alpha, planes)
