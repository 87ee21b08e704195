"""One image around the sampler: what it needs, how it becomes a job, and how the result becomes an image."""

from __future__ import annotations

import numpy as np

from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.images.color import fix_color
from moesr.runtime.images.planes import Planes, join, to_unit
from moesr.runtime.images.resize import imresize, reflect_pad
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import frame_of


def prepare(manifest: Manifest, planes: Planes, settings: Settings) -> Job:
    """Make the image on the latent grid and the image at output size, and a job of them."""
    m = manifest
    frame = frame_of(m, *planes.rgb.shape[:2])
    latent = frame.latent(m.latent_factor)
    if m.framing.small == "pad":
        rows, columns = frame.canvas
        source, _ = reflect_pad(planes.rgb, rows // m.scale, columns // m.scale, axes=(0, 1))
        lr = imresize(source, *frame.canvas, convention=m.framing.resize)
    else:
        enlarged = imresize(_deep(m, planes.rgb), *frame.image, convention=m.framing.resize)
        source = lr = reflect_pad(enlarged, *frame.canvas, axes=(0, 1))[0]
    condition = None
    if m.condition == "image":
        condition = source if source.shape[:2] == latent else imresize(source, *latent)
    return Job(m, lr, condition, settings)


def _deep(manifest: Manifest, rgb: np.ndarray) -> np.ndarray:
    """The same image with 16 bits a channel where the model is used to unrounded values."""
    if manifest.framing.resize == "matlab" or rgb.dtype == np.uint16:
        return rgb
    return rgb.astype(np.uint16) * np.uint16(257)


def finish(manifest: Manifest, planes: Planes, job: Job) -> np.ndarray:
    """Crop, correct the colors over the whole image, and return to integers and the layout of the input.

    What was enlarged beyond the scale is reduced again, its colors corrected.
    """
    assert job.image is not None
    height, width = (size * manifest.scale for size in planes.rgb.shape[:2])
    rows, columns = frame_of(manifest, *planes.rgb.shape[:2]).image
    top = np.iinfo(planes.rgb.dtype).max
    rgb = np.empty((height, width, 3), planes.rgb.dtype)
    style = np.empty((rows, columns), np.float32)
    for channel in range(3):  # one at a time: an 8K image takes 130 MB a plane
        plane = job.image[channel, :rows, :columns]
        if job.settings.color_fix != "none":
            to_unit(job.lr[:rows, :columns, channel], style)
            fix_color(plane, style, job.settings.color_fix, out=plane)
        if (rows, columns) != (height, width):
            plane = imresize(plane, height, width)
        np.add(plane, np.float32(1.0), out=plane)
        np.multiply(plane, np.float32(top / 2.0), out=plane)
        np.rint(plane, out=plane)
        rgb[..., channel] = np.clip(plane, 0, top, out=plane)
    alpha = None if planes.alpha is None else imresize(planes.alpha, height, width)
    return join(rgb, alpha, planes)
