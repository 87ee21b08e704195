"""One image around the sampler: what it needs, how it becomes a job, and how the result becomes an image."""

from __future__ import annotations

import numpy as np

from moesr.runtime.colour import fix_colour
from moesr.runtime.contract import DECODER
from moesr.runtime.errors import UsageError
from moesr.runtime.framing import frame_of
from moesr.runtime.jobs import Job, Settings
from moesr.runtime.manifest import Manifest
from moesr.runtime.pixels import Planes, join, to_unit
from moesr.runtime.resize import imresize
from moesr.runtime.tiles import reflect_pad


def check_settings(manifest: Manifest, settings: Settings) -> None:
    """Raise UsageError where an engine has not what settings ask for."""
    m, fidelity = manifest, settings.fidelity
    if settings.guidance != 1.0 and not m.guided:
        raise UsageError(
            f"guidance is {settings.guidance:g}, but {m.name} knows no negative prompt: export the engine "
            "with moesr-export --guidance S, or leave guidance at 1"
        )
    if settings.reuse > 1 and not m.deep:
        raise UsageError(
            f"reuse is {settings.reuse}, but {m.name} has no shallow graphs: export the engine with "
            "moesr-export --reuse, or leave reuse at 1"
        )
    decoder = m.graphs.get(DECODER)
    wraps = decoder is not None and any(spec.name == "fidelity" for spec in decoder.inputs)
    if fidelity != m.fidelity and not wraps:
        raise UsageError(
            f"fidelity is {fidelity:g}, but the decoder of {m.name} takes no features of the LR image: "
            "import the model with one that does (--cfw FILE of moesr-import), or leave fidelity out"
        )


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


def finish(manifest: Manifest, planes: Planes, job: Job, color_fix: str) -> np.ndarray:
    """Crop, correct the colours over the whole image, and return to integers and the layout of the input.

    What was enlarged beyond the scale is reduced again, its colours corrected.
    """
    assert job.image is not None
    height, width = (size * manifest.scale for size in planes.rgb.shape[:2])
    rows, columns = frame_of(manifest, *planes.rgb.shape[:2]).image
    top = np.iinfo(planes.rgb.dtype).max
    rgb = np.empty((height, width, 3), planes.rgb.dtype)
    style = np.empty((rows, columns), np.float32)
    for channel in range(3):  # one at a time: an 8K image takes 130 MB a plane
        plane = job.image[channel, :rows, :columns]
        if color_fix != "none":
            to_unit(job.lr[:rows, :columns, channel], style)
            fix_colour(plane, style, color_fix, out=plane)
        if (rows, columns) != (height, width):
            plane = imresize(plane, height, width)
        np.add(plane, np.float32(1.0), out=plane)
        np.multiply(plane, np.float32(top / 2.0), out=plane)
        np.rint(plane, out=plane)
        rgb[..., channel] = np.clip(plane, 0, top, out=plane)
    alpha = None if planes.alpha is None else imresize(planes.alpha, height, width)
    return join(rgb, alpha, planes)
