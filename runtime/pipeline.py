"""One image around the sampler: what it needs, how it becomes a job, and how the result becomes an image."""

from __future__ import annotations

import math

import numpy as np

from moesr.runtime.colour import fix_colour
from moesr.runtime.manifest import Manifest
from moesr.runtime.pixels import Planes, join
from moesr.runtime.resize import imresize
from moesr.runtime.scheduler import Job, Settings, to_unit
from moesr.runtime.tiles import reflect_pad

_BYTES_PER_PIXEL = 40  # of output: LR image resized, decoded sums, weights, one colour plane, result, latents


def canvas_size(manifest: Manifest, height: int, width: int) -> tuple[int, int]:
    """Size in LR pixels that an image is padded to: at least a tile, and a whole number of latent pixels."""
    multiple = manifest.latent_factor // math.gcd(manifest.scale, manifest.latent_factor)
    smallest = -(-manifest.tile // manifest.scale)

    def grown(size: int) -> int:
        return -(-max(size, smallest) // multiple) * multiple

    return grown(height), grown(width)


def latent_size(manifest: Manifest, height: int, width: int) -> tuple[int, int]:
    """Size of the latent canvas of an image of `height` x `width` LR pixels."""
    rows, columns = canvas_size(manifest, height, width)
    return rows * manifest.scale // manifest.latent_factor, columns * manifest.scale // manifest.latent_factor


def image_bytes(manifest: Manifest, height: int, width: int) -> int:
    """Estimate of the memory that an image takes beside the graphs."""
    return _BYTES_PER_PIXEL * math.prod(canvas_size(manifest, height, width)) * manifest.scale**2


def activation_bytes(manifest: Manifest, batch: int) -> int:
    """Estimate of the working memory of the hungriest graph, for `batch` tiles.

    A network that spends M multiply-accumulates a pixel is about sqrt(M) channels wide, however these are
    spread over its levels; that many float32 values a pixel is near the peak of the published networks.
    """
    grids = {"expert": manifest.latent_tile**2, "decoder": manifest.tile**2}  # pixels that a graph works on
    return max(int(batch * 4 * math.sqrt(manifest.macs.get(name, 0) * area)) for name, area in grids.items())


def prepare(manifest: Manifest, planes: Planes, settings: Settings) -> Job:
    """Make the condition and the decoder's LR image, and start a job with them."""
    height, width = planes.rgb.shape[:2]
    padded, _ = reflect_pad(planes.rgb, *canvas_size(manifest, height, width), axes=(0, 1))
    latent = latent_size(manifest, height, width)
    condition = padded if padded.shape[:2] == latent else imresize(padded, *latent)
    lr = imresize(padded, padded.shape[0] * manifest.scale, padded.shape[1] * manifest.scale)
    cond = np.empty((3, *condition.shape[:2]), np.float32)
    return Job(manifest, to_unit(condition.transpose(2, 0, 1), cond), lr, settings)


def finish(manifest: Manifest, planes: Planes, job: Job, color_fix: str) -> np.ndarray:
    """Crop, correct the colours over the whole image, and return to integers and the layout of the input."""
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
