"""Fits the linear map from latents to colors with which the runtime draws previews."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from moesr.runtime import Upscaler
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.preview_map import PreviewMap
from moesr.runtime.errors import MoesrError
from moesr.runtime.images.latent_preview import block_means
from moesr.runtime.images.resize import imresize
from moesr.runtime.upscaler import SamplingStep

SEED = 0
STEPS = 8
"""The engine samples the test image with at most so many steps."""

LEAST_FIT = 0.3
"""The least part of a result's variance that the latent itself explains; otherwise the LR image is added."""

DIGITS = 5

log = logging.getLogger("moesr")


def preview_map(directory: Path, manifest: Manifest) -> PreviewMap | None:
    """Super-resolve a test image of one tile with a written engine, and fit its latent to its result.

    If a linear function of the latent does not explain the result, the latent encodes only what the LR image
    lacks, and the map adds that image. None if ONNX Runtime cannot run the engine on this CPU.
    """
    image = test_image(max(manifest.tile // manifest.scale, 1))
    steps: list[SamplingStep] = []
    try:
        with Upscaler(directory, backend="onnxruntime", device="cpu", verify=False, cache=False) as up:
            count = min(STEPS, manifest.schedule.timesteps)
            result = up(image, steps=count, color_fix="none", on_step=steps.append)
    except (MoesrError, MemoryError) as error:
        log.info("the engine gets no map for previews: %s", error)
        return None
    factor = manifest.latent_factor
    target = block_means(_unit(result), factor)
    rows, columns = target.shape[1:]
    latents = steps[-1].latents[:, :rows, :columns]
    lr = _unit(imresize(image, rows, columns))
    weights, bias, explained = _fit(latents, target)
    adds_lr = explained < LEAST_FIT
    if adds_lr:
        weights, bias, explained = _fit(latents, target - lr)
    log.info("the map for previews explains %.2f of the variance", explained)
    red, green, blue = (tuple(round(float(value), DIGITS) for value in row) for row in weights)
    r, g, b = (round(float(value), DIGITS) for value in bias)
    return PreviewMap((red, green, blue), (r, g, b), adds_lr)


def test_image(side: int) -> np.ndarray:
    """Return uint8 [side, side, 3]: smooth areas of random colors, with ever finer ones on them."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    total, size, strength = np.zeros((side, side, 3)), 2, 1.0
    while size <= side:
        colors = rng.uniform(-1, 1, (size, size, 1)) + rng.uniform(-0.5, 0.5, (size, size, 3))
        pixels = np.rint((colors * 0.3 + 0.5).clip(0, 1) * 255).astype(np.uint8)
        total += strength * (imresize(pixels, side, side) / 255.0 - 0.5)
        size, strength = size * 2, strength * 0.7
    return np.rint((total + 0.5).clip(0, 1) * 255).astype(np.uint8)


def _unit(pixels: np.ndarray) -> np.ndarray:
    """Return uint8 [H, W, 3] as float32 [3, H, W] from -1 to 1."""
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def _fit(latents: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return weights [3, C], bias [3] and the explained part of the variance, for [C, h, w] and [3, h, w]."""
    z, y = (array.reshape(len(array), -1).T.astype(np.float64) for array in (latents, target))
    inputs = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    solution = np.linalg.lstsq(inputs, y, rcond=1e-6)[0]
    variance = y.var(axis=0).sum()
    explained = 1.0 - (y - inputs @ solution).var(axis=0).sum() / variance if variance else 0.0
    return solution[:-1].T, solution[-1], float(explained)
