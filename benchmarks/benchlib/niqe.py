"""NIQE (Mittal, Soundararajan, Bovik 2013): the distance of an image's statistics from those of photographs.

The result equals that of BasicSR's function without a cropped border: features of luma in blocks of 96 x 96
pixels, and of 48 x 48 pixels at half size, are compared with a model of pristine photographs. Lower is
better; photographs score about 2 to 5. Other programs (pyiqa) differ in the second decimal.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage, special

from moesr.runtime.errors import InputError
from moesr.runtime.images.measures import luma

BLOCK_PX = 96  # side of a block at full size
HALVING = np.array([-3, -9, 29, 111, 111, 29, -9, -3], np.float32) / 256  # MATLAB's imresize by 0.5
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # offsets of the neighbors in products of neighboring coefficients
ENTRIES = {"mu_pris_param": (1, 36), "cov_pris_param": (36, 36), "gaussian_window": (7, 7)}


@dataclass(frozen=True)
class Pristine:
    """The multivariate Gaussian of the features of undistorted photographs, and the local window."""

    mean: np.ndarray  # [36]
    covariance: np.ndarray  # [36, 36]
    window: np.ndarray  # [7, 7], sum 1


def load(path: Path) -> Pristine:
    """Read BasicSR's `niqe_pris_params.npz`; InputError if it is another file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name].astype(np.float64) for name in ENTRIES}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(
            f"{path}: not NIQE's pristine model ({error}); give BasicSR's niqe_pris_params.npz"
        ) from error
    for name, shape in ENTRIES.items():
        if arrays[name].shape != shape:
            raise InputError(f"{path}: {name} has shape {arrays[name].shape}, expected {shape}")
    mean, covariance, window = arrays.values()
    return Pristine(mean[0], covariance, window)


def niqe(image: np.ndarray, model: Pristine) -> float:
    """Compute NIQE of a uint8 image, RGB [H, W, 3] or luma [H, W]; NaN with fewer than two whole blocks."""
    plane = np.round(luma(image)) if image.ndim == 3 else image
    rows, columns = (side // BLOCK_PX for side in plane.shape)
    if rows * columns < 2:
        return float("nan")
    plane = plane[: rows * BLOCK_PX, : columns * BLOCK_PX].astype(np.float32)
    sizes = ((plane, BLOCK_PX), (halved(plane), BLOCK_PX // 2))
    each = [[block_features(b) for b in blocks(normalised(p, model.window), side)] for p, side in sizes]
    features = np.concatenate(each, axis=1)  # [blocks, 36]
    mean = np.nanmean(features, axis=0)
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        return float("nan")
    off = model.mean - mean
    spread = np.linalg.pinv((model.covariance + np.cov(whole, rowvar=False)) / 2)
    return float(np.sqrt(off @ spread @ off))


def normalised(plane: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return MSCN coefficients, float32 [H, W]: (luma - local mean) / (local deviation + 1)."""
    window = window.astype(np.float32)
    mean = ndimage.convolve(plane, window, mode="nearest")
    square = ndimage.convolve(plane * plane, window, mode="nearest")
    return (plane - mean) / (np.sqrt(np.abs(square - mean * mean)) + 1)


def halved(plane: np.ndarray) -> np.ndarray:
    """MATLAB's bicubic imresize by 0.5, antialiased and not rounded: float32 [H/2, W/2]."""
    for axis in (0, 1):
        pad = [(3, 3) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.moveaxis(np.pad(plane, pad, mode="symmetric"), axis, 0)
        count = plane.shape[axis] // 2
        halves = np.stack([tap * padded[i : i + 2 * count : 2] for i, tap in enumerate(HALVING)])
        plane = np.moveaxis(halves.sum(axis=0), 0, axis)
    return plane


def blocks(plane: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """Yield the blocks of `side` x `side` pixels, row by row."""
    for y in range(0, plane.shape[0], side):
        for x in range(0, plane.shape[1], side):
            yield plane[y : y + side, x : x + side]


def block_features(block: np.ndarray) -> list[float]:
    """Return shape and mean scale of a block's coefficients, and four figures per product of neighbors."""
    shape, left, right = asymmetric_gaussian(block)
    features = [shape, (left + right) / 2]
    for shift in SHIFTS:
        shape, left, right = asymmetric_gaussian(block * np.roll(block, shift, axis=(0, 1)))
        mean = (right - left) * special.gamma(2 / shape) / special.gamma(1 / shape)
        features += [shape, mean, left, right]
    return features


def asymmetric_gaussian(values: np.ndarray) -> tuple[float, float, float]:
    """Fit an asymmetric generalized Gaussian by its moments: shape, left scale and right scale.

    Returns NaN if all values have the same sign, as in a flat area.
    """
    values = values.ravel().astype(np.float64)
    below, above = values[values < 0], values[values > 0]
    if not len(below) or not len(above):
        return float("nan"), float("nan"), float("nan")
    left, right = np.sqrt(np.mean(below**2)), np.sqrt(np.mean(above**2))
    gamma = left / right
    ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    ratio *= (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    shapes, ratios = shape_table()
    shape = shapes[np.argmin((ratios - ratio) ** 2)]
    scale = np.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
    return float(shape), float(left * scale), float(right * scale)


@functools.cache
def shape_table() -> tuple[np.ndarray, np.ndarray]:
    """Return the shapes 0.2, 0.201 .. 10 and the ratio of moments of each."""
    shapes = np.arange(0.2, 10.001, 0.001)
    inverse = 1 / shapes
    ratios = special.gamma(2 * inverse) ** 2 / (special.gamma(inverse) * special.gamma(3 * inverse))
    return shapes, ratios
