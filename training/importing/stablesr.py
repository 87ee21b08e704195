"""Read StableSR's published weight files and write them as a checkpoint directory.

One file holds the denoising UNet (prefix `model.diffusion_model.`), the structure encoder
(`structcond_stage_model.`), the text encoder (`cond_stage_model.`) and a plain autoencoder. A second file
holds the same autoencoder with controllable feature wrapping (CFW); this one is used. There are no EMA
weights. Sizes are inferred from the shapes of the tensors, and the kind of prediction from the file name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from moesr.runtime.errors import UsageError
from moesr.runtime.sampling.samplers import Prediction
from moesr.training.checkpoint import Checkpoint, check_writable_as_checkpoint, save_checkpoint
from moesr.training.config import AutoencoderConfig, StableSRConfig, StableSRUNetConfig, StructureConfig
from moesr.training.importing.files import (
    AUTOENCODER_PREFIX,
    CURE,
    SCHEDULE_BUFFER,
    UNET_PREFIX,
    named,
    read_state_dict,
)
from moesr.training.importing.infer_config import (
    infer_stablesr_unet_config,
    infer_structure_config,
    infer_text_config,
)
from moesr.training.importing.moe_sr import read_autoencoder
from moesr.training.weights import CheckpointError, check_finite, check_shapes, expected_shapes, state_shapes

PREFIXES = {"expert": UNET_PREFIX, "structure": "structcond_stage_model.", "text": "cond_stage_model."}

States = dict[str, dict[str, Tensor]]  # state dicts by network; the keys are those of `PREFIXES`


@dataclass(frozen=True)
class Variant:
    """A published model: its file name, prediction, sampling steps and tile size."""

    name: str
    file: str  # regular expression for the start of the file name
    prediction: Prediction
    steps: int = StableSRConfig.steps
    tile: int = StableSRConfig.tile


VARIANTS = (
    Variant("stablesr-face", r"face_stablesr", "v"),
    Variant("stablesr-768v", r"stablesr_768v", "v", tile=768),
    Variant("stablesr-turbo", r"stablesr_turbo", "eps", steps=4),
    Variant("stablesr", r"stablesr_\d", "eps"),
)


@dataclass(frozen=True)
class PublishedStableSR:
    """Published files of StableSR and the properties that their tensors do not show."""

    model: Path
    cfw: Path
    scale: int = 4
    name: str | None = None  # None: a name from the variant and the scale
    prediction: Prediction | None = None  # None: inferred from the file name
    head_channels: int = StableSRUNetConfig.head_channels
    norm_groups: int = StructureConfig.norm_groups


def import_stablesr(
    source: PublishedStableSR,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    on_file: Callable[[Path], object] = lambda path: None,
) -> Checkpoint:
    """Write the checkpoint `directory` from published files.

    `dtype` is the type of the stored weights; `on_file` is called with each finished file. Raises
    CheckpointError naming a file that cannot be used, UsageError if it is unknown what the network predicts,
    and OutputError if the directory cannot be written; after any error the directory is unchanged.
    """
    check_writable_as_checkpoint(directory, force)
    for path in (source.model, source.cfw):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a published weight file")
    variant = _variant(source)
    decoder, decoder_config = _read_cfw(source)
    on_file(source.cfw)
    states = _read_model(source)
    config = _config(source, variant, states, decoder_config)
    shapes = expected_shapes(config, str(source.model))
    for part, prefix in PREFIXES.items():
        where = f"{source.model}, under {prefix}"
        check_shapes(where, state_shapes(states[part]), shapes[part], CURE)

    def checked() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for part, prefix in PREFIXES.items():
            state = states.pop(part)
            check_finite(f"{source.model}, under {prefix}", state, CURE)
            yield part, state
        on_file(source.model)

    parts = checked()
    experts = (state for _, state in islice(parts, 1))
    return save_checkpoint(directory, config, experts, decoder, others=parts, dtype=dtype, force=force)


def _variant(source: PublishedStableSR) -> Variant:
    """Find the published model by its file name; `source.prediction`, if set, replaces its prediction."""
    known = next((v for v in VARIANTS if re.match(v.file, source.model.name)), None)
    if source.prediction is not None:
        return dataclasses.replace(known or VARIANTS[-1], prediction=source.prediction)
    if known is None:
        raise UsageError(
            f"{source.model}: its name does not tell whether the network predicts eps or v; add --prediction "
            "eps (StableSR at 512 px, Turbo) or --prediction v (768v, faces)"
        )
    return known


def _read_cfw(source: PublishedStableSR) -> tuple[dict[str, Tensor], AutoencoderConfig]:
    """Read weights and sizes of the autoencoder; CheckpointError if it has no feature wrapping."""
    state, config = read_autoencoder(source.cfw, source.norm_groups)
    if not config.fusion_levels or config.codebook_size:
        raise CheckpointError(
            f"{source.cfw}: is not a KL autoencoder with feature wrapping (decoder.fusion_layer_1); {CURE}"
        )
    return state, config


def _read_model(source: PublishedStableSR) -> States:
    """Read each network's tensors without prefix; CheckpointError names tensors that belong to no network."""
    states: States = {part: {} for part in PREFIXES}
    unknown = {}
    for key, tensor in read_state_dict(source.model).items():
        part = next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        if part is not None:
            states[part][key.removeprefix(PREFIXES[part])] = tensor
        elif not key.startswith(AUTOENCODER_PREFIX) and not SCHEDULE_BUFFER.fullmatch(key):
            unknown[key] = tensor
    check_shapes(str(source.model), state_shapes(unknown), {}, CURE)
    for part, prefix in PREFIXES.items():
        if not states[part]:
            raise CheckpointError(f"{source.model}: holds nothing under {prefix} ({part}); {CURE}")
    return states


def _config(
    source: PublishedStableSR, variant: Variant, states: States, decoder: AutoencoderConfig
) -> StableSRConfig:
    path, heads, groups = source.model, source.head_channels, source.norm_groups
    unet = named(path, infer_stablesr_unet_config, states["expert"], heads, groups)
    structure = named(path, infer_structure_config, states["structure"], heads, groups)
    text = named(path, infer_text_config, states["text"], heads)
    try:
        return StableSRConfig(
            name=source.name or f"{variant.name}-x{source.scale}",
            scale=source.scale,
            unet=unet,
            structure=structure,
            text=text,
            decoder=decoder,
            prediction=variant.prediction,
            steps=variant.steps,
            tile=variant.tile,
        )
    except UsageError as error:
        raise CheckpointError(f"{path} and {source.cfw}: {error}") from error
