"""Records the inputs of every graph while the sampler runs on photographs, to calibrate int8 on them.

A sampling expert only ever reads latents of its own timesteps, which earlier experts have made. Therefore the
sampler itself runs, in PyTorch, on reduced photographs, and the inputs of every graph are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.errors import UsageError
from moesr.runtime.images.planes import to_unit
from moesr.runtime.images.resize import imresize, reflect_pad
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.sampling.schedule import StepTable
from moesr.training.checkpoint import Checkpoint
from moesr.training.config import ModelConfig
from moesr.training.data import demo_photos
from moesr.training.data.photographs import image_files, read_rgb

IMAGES = 8
"""The default number of photographs: seven to calibrate on, and one for the proof."""

Inputs = dict[str, np.ndarray]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Recording:
    """The recorded inputs by role, ordered by image and then by step (one decoding per image).

    The last image is held out; graphs are proved on it.
    """

    inputs: dict[str, list[Inputs]]
    images: int
    steps: int

    def calibrating(self, role: str) -> list[Inputs]:
        """Return the inputs of a role that ranges are measured on."""
        return self.inputs[role][: -self._each(role)]

    def proving(self, role: str) -> Inputs:
        """Return a batch of a role's first and last input for the held-out image."""
        own = self.inputs[role][-self._each(role) :]
        chosen = own if len(own) == 1 else [own[0], own[-1]]
        return {name: np.concatenate([given[name] for given in chosen]) for name in own[0]}

    def _each(self, role: str) -> int:
        return len(self.inputs[role]) // self.images


def photographs(folder: Path, count: int = IMAGES) -> list[np.ndarray]:
    """Read up to `count` photographs of a folder, evenly spaced by name, as uint8 RGB [H, W, 3].

    UsageError is raised if there are fewer than two, and InputError if one cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"--calibrate {folder}: no such folder; name a folder of photographs")
    paths = image_files(folder)
    if len(paths) < 2:
        raise UsageError(
            f"--calibrate {folder}: {len(paths)} photographs there, expected 2 or more (8 are enough); name "
            "another folder"
        )
    return [read_rgb(path) for path in spread(paths, count)]


def demo_photographs(count: int = IMAGES) -> list[np.ndarray]:
    """Return photographs that come with Python packages; UsageError if these are not installed."""
    try:
        return spread(list(demo_photos.photographs("train").values()), count)
    except ImportError as error:
        raise UsageError(
            f"int8 needs photographs to calibrate on ({error}); name a folder of them with --calibrate, or "
            "install those that come with scikit-image and others: pip install 'moesr[bench]'"
        ) from error


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return up to `count` items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


@torch.inference_mode()
def record(
    checkpoint: Checkpoint,
    images: Sequence[np.ndarray],
    tile_px: int,
    steps: int | None = None,
    on_role: Callable[[str], None] = lambda role: None,
) -> Recording:
    """Run the sampler on the middle of each photograph, reduced by the model's scale.

    Each photograph has its own noise. `steps` defaults to the model's, and is increased until every expert
    serves a step. `on_role` is called with the role of each expert when it begins.
    """
    config = checkpoint.config
    table = step_list(config, steps or config.steps)
    latent_px = tile_px // config.decoder.factor
    pairs = [conditions(image, config.scale, tile_px, latent_px) for image in images]
    shape = (config.decoder.embed_dim, latent_px, latent_px)
    latents = [noise.gaussian(i, noise.INITIAL_NOISE, shape) for i in range(len(images))]
    history = [np.zeros(shape, np.float32) for _ in latents]
    inputs: dict[str, list[Inputs]] = {}
    for k, first, last in runs_of_experts(table):
        network, role = checkpoint.expert(k), f"expert_{k}"
        on_role(role)
        for i, (cond, _) in enumerate(pairs):
            for step in range(first, last):
                t = table.t[step : step + 1].astype(np.float32)
                given = {"z_t": latents[i][None].copy(), "cond": cond, "t": t}
                inputs.setdefault(role, []).append(given)
                out = network(*(torch.from_numpy(value) for value in given.values())).numpy()[0]
                c = samplers.coefficients(table, step, config.prediction)
                added, out = noise.gaussian(i, step, shape), np.ascontiguousarray(out)
                samplers.advance(latents[i], out, added, c, np.empty_like(out), history[i])
    inputs[DECODER] = [{"z": z[None]} for z in latents]
    for given, (_, lr) in zip(inputs[DECODER], pairs, strict=True):
        if config.decoder.takes_lr:
            given["lr"] = lr
        if config.decoder.fusion_levels:
            given["fidelity"] = np.ones(1, np.float32)
    return Recording(inputs, len(images), len(table))


def step_list(config: ModelConfig, steps: int) -> StepTable:
    """Return the sampler's steps; their number is doubled until every expert serves one."""
    table = samplers.SAMPLERS[config.sampler].table(config.schedule, steps, config.expert_ranges)
    if len(set(table.expert)) < len(config.expert_ranges):
        return step_list(config, min(2 * steps, config.schedule.timesteps))
    return table


def conditions(image: np.ndarray, scale: int, tile_px: int, latent_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the reduced photograph as the graphs take it, on the latent grid and at the size of the output.

    Both are float32 [1, 3, side, side] in [-1, 1].
    """
    small = reduced(image, scale, tile_px)
    small, _ = reflect_pad(small, tile_px // scale, tile_px // scale, axes=(0, 1))
    return _unit(imresize(small, latent_px, latent_px)), _unit(imresize(small, tile_px, tile_px))


def reduced(image: np.ndarray, scale: int, tile_px: int) -> np.ndarray:
    """Cut the middle of a photograph, as large as a tile, and reduce it by the scale."""
    sides = [min(side, tile_px) // scale * scale for side in image.shape[:2]]
    top, left = ((side - kept) // 2 for side, kept in zip(image.shape[:2], sides, strict=True))
    middle = np.ascontiguousarray(image[top : top + sides[0], left : left + sides[1]])
    return imresize(middle, sides[0] // scale, sides[1] // scale)


def runs_of_experts(table: StepTable) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first step, step after the last) in the order of sampling."""
    edges = [0, *(np.flatnonzero(np.diff(table.expert)) + 1), len(table)]
    for first, last in pairwise(edges):
        yield int(table.expert[first]), int(first), int(last)


def _unit(image: np.ndarray) -> np.ndarray:
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    unit = np.empty(planes.shape, np.float32)
    to_unit(planes, unit)
    return unit[None]
