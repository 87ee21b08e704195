"""Read published weight files of Stable Diffusion 2, the base of StableSR, and write a checkpoint directory.

In the published layout one file holds all networks, with the prefixes `model.diffusion_model.`,
`first_stage_model.` and `cond_stage_model.`. In the diffusers layout there is one file per network, in a
directory with `unet`, `vae` and `text_encoder` or named individually. If a file holds EMA weights, these are
used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesr.runtime.errors import UsageError
from moesr.runtime.sampling.samplers import Prediction
from moesr.training.checkpoint import Checkpoint, check_writable_as_checkpoint, save_checkpoint
from moesr.training.config import StableDiffusionConfig, StableSRUNetConfig
from moesr.training.importing.diffusers_names import part_of, text_state, unet_state, vae_state
from moesr.training.importing.files import (
    AUTOENCODER_PREFIX,
    CURE,
    SCHEDULE_BUFFER,
    UNET_PREFIX,
    named,
    read_state_dict,
)
from moesr.training.importing.infer_config import (
    infer_autoencoder_config,
    infer_diffusion_unet_config,
    infer_text_config,
)
from moesr.training.importing.moe_sr import EMA_PREFIX, ema_weights
from moesr.training.weights import (
    CheckpointError,
    check_finite,
    check_shapes,
    expected_shapes,
    state_shapes,
)

PREFIXES = {"expert": UNET_PREFIX, "decoder": AUTOENCODER_PREFIX, "text": "cond_stage_model."}
FIRST_VERSION = "cond_stage_model.transformer."  # prefix of the text encoder of Stable Diffusion 1
FOLDERS = ("unet", "vae", "text_encoder")
FILES = tuple(
    f"{stem}{variant}.{suffix}"
    for variant in ("", ".fp16")
    for stem, suffix in (
        ("diffusion_pytorch_model", "safetensors"),
        ("model", "safetensors"),
        ("diffusion_pytorch_model", "bin"),
        ("pytorch_model", "bin"),
    )
)
"""File names that diffusers gives a network's weights, the preferred one first."""

PARTS: dict[str, tuple[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]] = {
    "unet": ("expert", unet_state),
    "vae": ("decoder", vae_state),
    "text": ("text", text_state),
}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}
NAMES: tuple[tuple[str, Prediction], ...] = ((r".*768", "v"), (r".*(512|turbo)", "eps"))
"""Regular expressions for names of published files, and what the network in such a file predicts."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class PublishedDiffusion:
    """Published files of Stable Diffusion 2 and the properties that their tensors do not show."""

    files: tuple[Path, ...]  # one file for all networks, one per network, or a diffusers directory
    name: str | None = None
    prediction: Prediction | None = None  # None: inferred from the file name or the diffusers configuration
    head_channels: int = StableSRUNetConfig.head_channels
    norm_groups: int = StableSRUNetConfig.norm_groups


@dataclass(frozen=True)
class _Found:
    """A network's weights under the published names, and their origin for messages."""

    where: str
    state: State


def import_diffusion(
    source: PublishedDiffusion,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    on_file: Callable[[Path], object] = lambda path: None,
) -> Checkpoint:
    """Write the checkpoint `directory` from published files.

    `dtype` is the type of the stored weights; `on_file` is called with each file that was read. Raises
    CheckpointError naming a file that cannot be used, UsageError if it is unknown what the network predicts,
    and OutputError if the directory cannot be written; after any error the directory is unchanged.
    """
    check_writable_as_checkpoint(directory, force)
    paths = weight_files(source.files)
    prediction = source.prediction or _prediction(source.files)
    found: dict[str, _Found] = {}
    for path in paths:
        found |= _read(path)
        on_file(path)
    lacking = [part for part in PREFIXES if part not in found]
    if lacking:
        raise CheckpointError(
            f"{', '.join(map(str, paths))}: no weights of {', '.join(lacking)} (expert: the UNet, decoder: "
            f"the autoencoder); {CURE}"
        )
    config = _config(source, found, prediction)
    shapes = expected_shapes(config, found["expert"].where)
    for part, network in found.items():
        check_shapes(network.where, state_shapes(network.state), shapes[part], CURE)
        check_finite(network.where, network.state, CURE)
    states = {part: network.state for part, network in found.items()}
    others = [("text", states["text"])]
    return save_checkpoint(
        directory, config, [states["expert"]], states["decoder"], others=others, dtype=dtype, force=force
    )


def weight_files(given: tuple[Path, ...]) -> list[Path]:
    """Return the files to read; CheckpointError if one is missing."""
    if len(given) == 1 and given[0].is_dir():
        return [file_in(given[0] / folder) for folder in FOLDERS]
    for path in given:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a published weight file")
    return list(given)


def file_in(folder: Path) -> Path:
    """Return the weight file in a folder of diffusers, the preferred one of several."""
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: no weights there, expected one of {', '.join(FILES[:4])}; give a diffusers directory "
            f"with {', '.join(FOLDERS)}"
        )
    return found


def _prediction(given: tuple[Path, ...]) -> Prediction:
    """Infer what the network predicts from its file name or the scheduler configuration of diffusers."""
    scheduler = given[0] / "scheduler" / "scheduler_config.json"
    if given[0].is_dir() and scheduler.is_file():
        try:
            said = json.loads(scheduler.read_text(encoding="utf-8"))["prediction_type"]
            return PREDICTIONS[said]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{scheduler}: cannot be used ({error!r}); add --prediction") from error
    for pattern, prediction in NAMES:
        if any(re.match(pattern, path.name) for path in given):
            return prediction
    raise UsageError(
        f"{given[0]}: its name does not tell whether the network predicts eps or v; add --prediction eps "
        "(the models for 512 px, Turbo) or --prediction v (those for 768 px)"
    )


def _read(path: Path) -> dict[str, _Found]:
    """Read all networks in one file, by part."""
    state = read_state_dict(path)
    part = part_of(state)
    if part is not None:
        name, convert = PARTS[part]
        return {name: _Found(str(path), convert(state))}
    if any(key.startswith(FIRST_VERSION) for key in state):
        raise CheckpointError(
            f"{path}: holds the text encoder of Stable Diffusion 1; StableSR needs Stable Diffusion 2.1"
        )
    states: dict[str, State] = {part: {} for part in PREFIXES}
    averages, unknown = {}, {}
    for key, tensor in state.items():
        part = next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        if key.startswith(EMA_PREFIX):
            averages[key.removeprefix(EMA_PREFIX)] = tensor
        elif part is not None and not key.startswith(f"{AUTOENCODER_PREFIX}loss."):
            states[part][key.removeprefix(PREFIXES[part])] = tensor
        elif part is None and not SCHEDULE_BUFFER.fullmatch(key):
            unknown[key] = tensor
    check_shapes(str(path), state_shapes(unknown), {}, CURE)
    if averages and states["expert"]:
        states["expert"] = ema_weights(path, states["expert"], averages)
    return {part: _Found(f"{path}, under {PREFIXES[part]}", own) for part, own in states.items() if own}


def _config(
    source: PublishedDiffusion, found: Mapping[str, _Found], prediction: Prediction
) -> StableDiffusionConfig:
    heads, groups = source.head_channels, source.norm_groups
    unet, text, decoder = (found[part] for part in ("expert", "text", "decoder"))
    sizes = {
        "unet": named(Path(unet.where), infer_diffusion_unet_config, unet.state, heads, groups),
        "text": named(Path(text.where), infer_text_config, text.state, heads),
        "decoder": named(Path(decoder.where), infer_autoencoder_config, decoder.state, groups),
    }
    name = source.name or StableDiffusionConfig.name
    try:
        return StableDiffusionConfig(name=name, prediction=prediction, **sizes)
    except UsageError as error:
        raise CheckpointError(f"{', '.join(map(str, source.files))}: {error}") from error
