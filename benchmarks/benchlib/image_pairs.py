"""Pairs of images for measurements: originals and the LR images made from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from moesr.runtime.errors import InputError, UsageError
from moesr.runtime.images.resize import imresize
from moesr.training.data.demo_photos import photographs
from moesr.training.data.photographs import image_files, read_rgb

DEGRADATIONS = {"x4-blind": 4, "x4-mild": 4, "x4-bicubic": 4, "x8-bicubic": 8}
"""Names of degradations and their scale: blind (Real-ESRGAN's), mild (StableSR's) or bicubic (imresize)."""

BLIND = ("x4-blind", "x4-mild")

MULTIPLE = 8  # sides of an original are cut to a multiple of this
LEAST_PX = 32  # smallest side: two borders of 8 pixels and the window of SSIM


def load_originals(source: str) -> dict[str, np.ndarray]:
    """Load originals by file name, uint8 RGB [H, W, 3], cropped to multiples of 8 pixels at right and bottom.

    `source` is a directory, or "demo" for the photographs of scikit-image that were held out of training.
    Raises UsageError if there is nothing to read and InputError naming an image that cannot be used.
    """
    if source == "demo":
        return {name: _crop(image, name) for name, image in photographs("validation").items()}
    if not Path(source).is_dir():
        raise UsageError(f"{source}: no such directory of originals; name one, or demo for three photographs")
    return {name: _crop(image, name) for name, image in load_images(source).items()}


def load_images(source: str) -> dict[str, np.ndarray]:
    """Load the images of a directory by file name, uint8 RGB [H, W, 3].

    Raises UsageError if there is nothing to read and InputError naming an image that cannot be read.
    """
    directory = Path(source)
    if not directory.is_dir():
        raise UsageError(f"{source}: no such directory of images; name one")
    paths = image_files(directory)
    if not paths:
        raise UsageError(f"{source}: no images there; name a directory that holds some")
    return {path.name: read_rgb(path) for path in paths}


def _crop(image: np.ndarray, name: str) -> np.ndarray:
    height, width = (side // MULTIPLE * MULTIPLE for side in image.shape[:2])
    if min(height, width) < LEAST_PX:
        raise InputError(
            f"{name}: {image.shape[1]}x{image.shape[0]} pixels are too few to measure, "
            f"expected sides of at least {LEAST_PX}; remove it"
        )
    return np.ascontiguousarray(image[:height, :width])


def degrade(hr: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Make the LR image of an original, both uint8; `kind` is one of DEGRADATIONS.

    A blind degradation uses a generator seeded by `name`, so a file always gives the same LR image, whatever
    its folder and the other images are.
    """
    scale = DEGRADATIONS[kind]
    if kind not in BLIND:
        return imresize(hr, hr.shape[0] // scale, hr.shape[1] // scale)
    import torch

    from moesr.training.data.degradation import BlindDegradation, degrade_blind

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    batch = torch.tensor(hr).permute(2, 0, 1)[None].float() / 255
    config = BlindDegradation(scale) if kind == "x4-blind" else BlindDegradation.mild(scale)
    lr = degrade_blind(batch, config, torch.Generator().manual_seed(seed))
    return (lr[0] * 255).round().byte().permute(1, 2, 0).numpy()
