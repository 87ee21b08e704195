"""A model that is small enough to train in a test, photographs for it, and checkpoints of its stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moesr.runtime.system.json_dataclass import build
from moesr.training.checkpoint import Checkpoint, save_checkpoint
from moesr.training.data.crops import Crops
from moesr.training.data.photographs import scan
from moesr.training.loop.fit import Run
from moesr.training.networks import Autoencoder, DenoisingUNet
from moesr.training.recipe import Recipe, merged
from moesr.training.stages.common import plain

PATCH = 32
CPU = torch.device("cpu")

TINY: dict[str, Any] = {
    "model": {
        "name": "tiny",
        "scale": 4,
        "unet": {
            "width": 8,
            "channel_mult": [1, 2],
            "res_blocks": 1,
            "attention_factors": [2],
            "head_channels": 8,
            "norm_groups": 4,
            "space_experts": 3,
        },
        "decoder": {
            "channels": 8,
            "channel_mult": [1, 2, 4],
            "res_blocks": 1,
            "codebook_size": 16,
            "norm_groups": 4,
            "fusion_blocks": 1,
            "fusion_growth": 4,
            "filter_blocks": 2,
        },
        "expert_ranges": [[0, 500], [500, 1000]],
        "steps": 2,
    },
    "autoencoder": {"steps": 3, "batch": 2, "patch_px": PATCH, "learning_rate": 1e-3, "quantise_from": 1},
    "experts": {"steps": 3, "batch": 2, "accumulate": 2, "patch_px": PATCH, "learning_rate": 1e-3},
    "decoder": {
        "steps": 3,
        "batch": 2,
        "accumulate": 1,
        "patch_px": PATCH,
        "learning_rate": 1e-3,
        "latents": 5,
        "latent_steps": 2,
    },
}


def values(**changes: Any) -> dict[str, Any]:
    """Return the JSON values of the tiny recipe with changed entries, nested as in `experts={"steps": 5}`."""
    return merged(TINY, changes)


def recipe(**changes: Any) -> Recipe:
    """Return the tiny recipe with changed entries."""
    return build(Recipe, values(**changes), strict=True)


def write_recipe(path: Path, **changes: Any) -> Path:
    """Write the tiny recipe as JSON and return its path."""
    path.write_text(json.dumps(values(**changes)))
    return path


def photographs(folder: Path, count: int = 2, side: int = 48) -> Path:
    """Write smooth images with some noise, `side` pixels high and a little wider."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((side + 8, side), Image.Resampling.BICUBIC))
        noisy = image.astype(np.int16) + rng.integers(-9, 10, image.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"photo_{i}.png")
    return folder


def crops(folder: Path, seed: int = 0) -> Crops:
    """Return crops of the photographs in `folder`."""
    return Crops(scan(folder).at_least(PATCH), PATCH, seed)


def run(directory: Path, **options: Any) -> Run:
    """Return a run on the CPU that prints nothing."""
    return dataclasses.replace(Run(directory, 0, CPU, quiet=True), **options)


def first_stage(directory: Path, of: Recipe) -> Checkpoint:
    """Save an untrained first stage of a recipe."""
    torch.manual_seed(1)
    config = plain(of.model.decoder)
    model = dataclasses.replace(of.model, unet=None, decoder=config)
    return save_checkpoint(directory, model, [], Autoencoder(config).state_dict(), force=True)


def stage_1(directory: Path, of: Recipe) -> Checkpoint:
    """Save untrained experts with an untrained plain decoder."""
    torch.manual_seed(2)
    config = plain(of.model.decoder)
    model = dataclasses.replace(of.model, decoder=config)
    assert of.model.unet is not None
    experts = [randomised(DenoisingUNet(of.model.unet)).state_dict() for _ in of.model.expert_ranges]
    return save_checkpoint(directory, model, experts, Autoencoder(config).state_dict(), force=True)


def randomised(network: DenoisingUNet) -> DenoisingUNet:
    """Fill the last layer, which starts at zero and would hide the influence of all others."""
    torch.nn.init.normal_(network.get_parameter("out.2.weight"), std=0.05)
    return network


def losses(directory: Path) -> list[float]:
    """Return the training losses in `losses.jsonl`, ordered by step."""
    lines = [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(len(steps)))
    return [line["loss"] for line in steps]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return True if two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
