"""The training set of stage 2: (LR, latent, HR) triples whose latents stage 1 samples from the LR images.

A directory holds `set.json` (the settings that the triples were made with) and shards
`shard_00000.safetensors` with the tensors `lr` uint8 [n, 3, p, p], `latent` float32 [n, D, h, w] and `hr`
uint8 [n, 3, P, P]. Latents are in the decoder's scale, not the UNet's. If there is a codebook, they are
quantized already, since the search for codes would take half the time of training a narrow decoder. A shard
is written whole or not at all, so the same command continues an incomplete set. Processes started by torchrun
divide the shards among them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from moesr.runtime.errors import InputError, OutputError, UsageError
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.sampling.schedule import StepTable
from moesr.runtime.system import console
from moesr.runtime.system.files import new_file, reason
from moesr.training.checkpoint import Checkpoint
from moesr.training.config import StableSRConfig
from moesr.training.data.crops import Crops, condition, resize_batch, to_float
from moesr.training.loop import distributed
from moesr.training.loop.fit import Run
from moesr.training.loop.interrupts import stop_requests
from moesr.training.losses.diffusion import sample
from moesr.training.networks import Autoencoder
from moesr.training.recipe import Recipe
from moesr.training.seeded_random import ENCODED, SAMPLING, SampleRng, seed_of
from moesr.training.stages.common import degradation
from moesr.training.stages.structure import Denoiser, denoiser_of, scaled_latent

SET_NAME = "set.json"
COLUMNS = ("lr", "latent", "hr")
SHARD = 64  # triples per file
OPEN_SHARDS = 64  # files that each loader process keeps memory-mapped

Sampler = Callable[[Tensor, SampleRng], Tensor]  # LR uint8 [B, 3, p, p] -> latents [B, D, h, w]
Encoder = Callable[[Tensor], Tensor]  # HR uint8 [B, 3, P, P] -> latents [B, D, h, w]


def describe(recipe: Recipe, start: Checkpoint, data: Crops, count: int) -> dict[str, Any]:
    """Return the settings that `count` triples are made with; they must match those of an existing set."""
    share = recipe.decoder.encoded_share
    mixed = {"encoded_share": share} if share else {}
    return {
        "schema": 2,
        "triples": count,
        "shard": SHARD,
        "stage1": start.sha256(),
        "scale": recipe.model.scale,
        "degradation": recipe.degradation,
        "bicubic_share": recipe.bicubic_share,
        "augmentation": asdict(data.augmentation),
        "patch_px": data.patch_px,
        "sampler": recipe.model.sampler,
        "steps": recipe.decoder.latent_steps,
        "seed": recipe.seed,
        "photographs": len(data.paths),
        **mixed,
    }


def make(recipe: Recipe, start: Checkpoint, data: Crops, run: Run, directory: Path, count: int) -> None:
    """Make the missing shards of a set of `count` triples in `directory`.

    Raises UsageError if the directory holds a set with other settings. Ctrl-C finishes the current shard.
    """
    wanted = describe(recipe, start, data, count)
    if (directory / SET_NAME).exists():
        _check(directory, wanted)
    elif distributed.rank() == 0:
        _write(directory / SET_NAME, (json.dumps(wanted, indent=1) + "\n").encode())
    distributed.wait()
    # Which shards a process makes does not depend on the files, which other processes may be writing now.
    share = list(enumerate(shard_sizes(count)))[distributed.rank() :: distributed.size()]
    missing = {number: n for number, n in share if not _whole(shard_path(directory, number), n)}
    if missing:
        _make_shards(recipe, start, data, run, directory, missing)
    distributed.wait()


def _make_shards(
    recipe: Recipe, start: Checkpoint, data: Crops, run: Run, directory: Path, sizes: Mapping[int, int]
) -> None:
    """Make shards; `sizes` holds the number of triples by shard number."""
    batch, sampler = recipe.decoder.latent_batch, _sampler(recipe, start, run.device)
    encode = encoder(start, run.device) if recipe.decoder.encoded_share else None
    hidden = run.quiet or distributed.rank() > 0
    with (
        stop_requests() as stopping,
        console.bar(hidden, iterable=sizes, desc="latents", unit="shard") as bar,
    ):
        for number in bar:
            indices = range(number * SHARD, number * SHARD + sizes[number])
            parts = [
                _triples(indices[at : at + batch], sampler, encode, recipe, data, run.device)
                for at in range(0, len(indices), batch)
            ]
            columns = (torch.cat(column).contiguous() for column in zip(*parts, strict=True))
            _write(shard_path(directory, number), save(dict(zip(COLUMNS, columns, strict=True))))
            if stopping.is_set():
                stopping.stop()


def encoder(start: Checkpoint, device: torch.device) -> Encoder:
    """Return a function that encodes originals with the first stage, including quantization."""
    first_stage = start.decoder().to(device)
    quantise = first_stage.quantize if first_stage.config.codebook_size else nn.Identity()
    return lambda hr: quantise(first_stage.encode(to_float(hr)))


def _sampler(recipe: Recipe, start: Checkpoint, device: torch.device) -> Sampler | None:
    """Return a function that samples latents with stage 1; None if there are no experts yet."""
    model = recipe.model
    if model.unet is None and recipe.decoder.encoded_share:
        return None
    try:
        steps = recipe.decoder.latent_steps
        table = SAMPLERS[model.sampler].table(model.schedule, steps, model.expert_ranges)
    except ValueError as error:
        raise UsageError(f"decoder.latent_steps: {error}") from error
    first_stage = start.decoder().to(device)
    if isinstance(model, StableSRConfig):
        denoiser = denoiser_of(start, model, device)
        return partial(_stablesr_latents, model, denoiser, first_stage, table)
    experts = [start.expert(k).to(device) for k in range(len(model.expert_ranges))]
    quantise = first_stage.quantize if first_stage.config.codebook_size else nn.Identity()

    def latents(lr: Tensor, rng: SampleRng) -> Tensor:
        cond = condition(lr, model.scale, model.decoder.factor)
        return quantise(sample(experts, cond, table, rng, model.prediction))

    return latents


def _stablesr_latents(
    model: StableSRConfig,
    denoiser: Denoiser,
    first_stage: Autoencoder,
    table: StepTable,
    lr: Tensor,
    rng: SampleRng,
) -> Tensor:
    """Sample the decoder's latents for LR uint8 [B, 3, p, p] with StableSR."""
    enlarged = to_float(resize_batch(lr, *(model.scale * side for side in lr.shape[-2:])))
    latent = scaled_latent(first_stage, enlarged, rng, model)
    noised = model.schedule if model.init == "latent" else None
    return sample([denoiser], latent, table, rng, model.prediction, noised) / model.latent_scale


def is_encoded(seed: int, share: float, number: int) -> bool:
    """Return True if triple `number` belongs to the `share` of triples with the encoder's latent."""
    return seed_of(seed, ENCODED, number) < share * 2**32


def _triples(
    indices: Sequence[int],
    sampler: Sampler | None,
    encode: Encoder | None,
    recipe: Recipe,
    data: Crops,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return LR, latents and HR of these samples, on the CPU.

    If there are no experts yet, the encoder's latent of another crop takes the place of a sampled latent.
    """
    hr = data.crops(indices[0], len(indices)).to(device)
    lr, share = degradation(recipe)(hr, torch.tensor(indices)), recipe.decoder.encoded_share
    encoded = torch.tensor([is_encoded(recipe.seed, share, i) for i in indices])
    with torch.inference_mode():
        if sampler is None:
            assert encode is not None
            made = encode(hr)
            latents = torch.where(encoded[:, None, None, None].to(device), made, made.roll(1, 0))
        elif encode is None or not encoded.any():
            latents = sampler(lr, SampleRng(recipe.seed, SAMPLING, indices))
        else:
            latents = encode(hr)
            others = [i for i, known in zip(indices, encoded.tolist(), strict=True) if not known]
            if others:
                rest = ~encoded.to(device)
                latents[rest] = sampler(lr[rest], SampleRng(recipe.seed, SAMPLING, others))
    return lr.cpu(), latents.cpu(), hr.cpu()


class Triples(Dataset[tuple[Tensor, ...]]):
    """A finished set; sample `index` is a random triple, or if `seed` is None, triple number `index`."""

    def __init__(self, directory: Path, seed: int | None) -> None:
        self.directory, self.seed = directory, seed
        made = read_description(directory)
        self.count = int(made["triples"])
        self.share, self.made_with = float(made.get("encoded_share", 0.0)), int(made["seed"])
        sizes = shard_sizes(self.count)
        lacking = sum(not _whole(shard_path(directory, i), n) for i, n in enumerate(sizes))
        if lacking:
            raise InputError(
                f"{directory}: {lacking} of {len(sizes)} shards are missing; run moesr-train latents again"
            )

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return the sample's number, HR uint8 [3, P, P], LR uint8 [3, p, p] and latent [D, h, w].

        In a mixed set a fifth value is True if the latent is the encoder's.
        """
        number = index % self.count
        if self.seed is not None:
            number = int(np.random.default_rng((self.seed, index)).integers(self.count))
        shard, row = _open(shard_path(self.directory, number // SHARD)), number % SHARD
        hr, lr, latent = (shard.get_slice(name)[row] for name in ("hr", "lr", "latent"))
        sample = torch.tensor(index), hr, lr, latent
        if not self.share:
            return sample
        return *sample, torch.tensor(is_encoded(self.made_with, self.share, number))


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open(path: Path) -> Any:
    return safe_open(path, framework="pt").__enter__()


def open_set(directory: Path, recipe: Recipe, start: Checkpoint) -> Triples:
    """Open an existing set made with any seed; UsageError if it does not match the recipe and stage 1."""
    found = read_description(directory)
    crops = Crops([], recipe.decoder.patch_px, recipe.seed, augmentation=recipe.augmentation)
    wanted = describe(recipe, start, crops, recipe.decoder.latents)
    _check(directory, wanted | {name: found.get(name) for name in ("photographs", "seed")})
    return Triples(directory, recipe.seed)


def read_description(directory: Path) -> dict[str, Any]:
    """Read `set.json`; InputError if it is missing or damaged."""
    path = directory / SET_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        int(values["triples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a set of latents ({error}); make one with moesr-train latents"
        ) from error
    return values


def shard_sizes(count: int) -> list[int]:
    """Return the number of triples in each shard of a set of `count` triples."""
    return [min(SHARD, count - at) for at in range(0, count, SHARD)]


def shard_path(directory: Path, number: int) -> Path:
    """Return the file of shard `number`."""
    return directory / f"shard_{number:05d}.safetensors"


def _check(directory: Path, wanted: dict[str, Any]) -> None:
    found = read_description(directory)
    other = [k for k in sorted({*wanted, *found}) if wanted.get(k) != found.get(k)]
    if other:
        what = ", ".join(f"{k} is {found.get(k)!r}, expected {wanted.get(k)!r}" for k in other)
        raise UsageError(f"{directory}: holds latents of something else: {what}; use another directory")


def _whole(path: Path, rows: int) -> bool:
    """Return True if `path` is a complete shard of `rows` triples; reads its header only."""
    try:
        with safe_open(path, framework="pt") as file:
            return all(file.get_slice(name).get_shape()[0] == rows for name in COLUMNS)
    except (OSError, SafetensorError):
        return False


def _write(path: Path, content: bytes) -> None:
    try:
        with new_file(path) as scratch:
            scratch.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {reason(error)}; then run again") from error
