"""One image around the sampler: what it needs, how it becomes a job, and how the result becomes an image."""

from __future__ import annotations

import numpy as np

from moesr.runtime.admission import canvas_size
from moesr.runtime.colour import fix_colour
from moesr.runtime.jobs import Job, Settings
from moesr.runtime.manifest import Manifest
from moesr.runtime.pixels import Planes, join, to_unit
from moesr.runtime.resize import imresize
from moesr.runtime.tiles import reflect_pad


def latent_size(manifest: Manifest, height: int, width: int) -> tuple[int, int]:
    """Size of the latent canvas of an image of `height` x `width` LR pixels."""
    rows, columns = canvas_size(manifest, height, width)
    return rows * manifest.scale // manifest.latent_factor, columns * manifest.scale // manifest.latent_factor


def prepare(manifest: Manifest, planes: Planes, settings: Settings) -> Job:
    """Make the image on the latent grid and the image at output size, and a job of them."""
    height, width = planes.rgb.shape[:2]
    padded, _ = reflect_pad(planes.rgb, *canvas_size(manifest, height, width), axes=(0, 1))
    latent = latent_size(manifest, height, width)
    condition = None
    if manifest.condition == "image":
        condition = padded if padded.shape[:2] == latent else imresize(padded, *latent)
    lr = imresize(padded, padded.shape[0] * manifest.scale, padded.shape[1] * manifest.scale)
    return Job(manifest, lr, condition, settings)


def finish(manifest: Manifest, planes: Planes, job: Job, color_fix: str) -> np.ndarray:
    """Crop, correct the colours over the whole image, and return to integers and the layout of the input."""
    assert job.image is not None
    height, width = (size * manifest.scale for size in planes.rgb.shape[:2])
    top = np.iinfo(planes.rgb.dtype).max
    rgb = np.empty((height, width, 3), planes.rgb.dtype)
    style = np.empty((height, width), np.float32)
    for channel in range(3):  # one at a time: an 8K image takes 130 MB a plane
        plane = job.image[channel, :height, :width]
        if color_fix != "none":
            to_unit(job.lr[:height, :width, channel], style)
            fix_colour(plane, style, color_fix, out=plane)
        np.add(plane, np.float32(1.0), out=plane)
        np.multiply(plane, np.float32(top / 2.0), out=plane)
        np.rint(plane, out=plane)
        rgb[..., channel] = np.clip(plane, 0, top, out=plane)
    alpha = None if planes.alpha is None else imresize(planes.alpha, height, width)
    return join(rgb, alpha, planes)
