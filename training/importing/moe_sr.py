"""Read published weight files of MoE-SR or plain latent diffusion and write them as a checkpoint directory.

Published files are pickled (or safetensors) state dicts, with or without a `state_dict` level. Keys of UNet
weights start with `model.diffusion_model.` or have no prefix. Their exponential moving averages (EMA), which
are preferred, start with `model_ema.` and have the dots of the name removed. All sizes are inferred from the
shapes of the tensors; `diffusion_facts` reads the schedule and the latent scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesr.training.checkpoint import Checkpoint, check_writable_as_checkpoint, save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig, UNetConfig
from moesr.training.importing.diffusion_facts import DiffusionFacts, diffusion_facts, scaled_autoencoder
from moesr.training.importing.files import (
    AUTOENCODER_PREFIX,
    CURE,
    SCHEDULE_BUFFER,
    UNET_PREFIX,
    float32,
    named,
    read_state_dict,
)
from moesr.training.importing.infer_config import infer_autoencoder_config, infer_unet_config
from moesr.training.weights import (
    CheckpointError,
    StateDict,
    check_finite,
    check_shapes,
    expected_shapes,
    merge_space_experts,
    state_shapes,
    with_counters,
)

EMA_PREFIX = "model_ema."


@dataclass(frozen=True)
class Published:
    """Published files and the properties that their tensors do not show. No experts means only a decoder."""

    decoder: Path
    experts: tuple[Path, ...] = ()  # lowest noise first
    scale: int = 4
    name: str | None = None  # None: a name from the kind and the scale
    head_channels: int = UNetConfig.head_channels
    norm_groups: int = UNetConfig.norm_groups


@dataclass(frozen=True)
class Imported:
    """Result of an import. `unet` has the number of space experts before they were merged."""

    checkpoint: Checkpoint
    unet: UNetConfig | None
    ema: tuple[bool, ...]  # per expert: True if its EMA weights were used, False if the raw weights
    facts: DiffusionFacts


def import_published(
    source: Published,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    on_file: Callable[[Path], object] = lambda path: None,
) -> Imported:
    """Write the checkpoint `directory` from published files.

    The schedule's timesteps are split evenly over the experts. If the experts' latents are scaled, the
    autoencoder is changed to have the same scale. Only one expert is in memory at a time. `dtype` is the type
    of the stored weights; `on_file` is called with each finished file. Raises CheckpointError naming a file
    that cannot be used, and OutputError if the directory cannot be written; after either error the directory
    is unchanged.
    """
    check_writable_as_checkpoint(directory, force)
    for path in (*source.experts, source.decoder):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a published weight file")
    decoder, decoder_config = read_autoencoder(source.decoder, source.norm_groups)
    on_file(source.decoder)
    unet, facts = _first_expert(source, decoder_config)
    facts.warn(source.experts[0] if source.experts else source.decoder)
    decoder = scaled_autoencoder(decoder, decoder_config, facts.latent_scale)
    ema_used: list[bool] = []

    def states() -> Iterator[StateDict]:
        for path in source.experts:
            found = _raw_unet(path, source)
            for what, first in ((found.config, unet), (found.facts, facts)):
                if what != first:
                    raise CheckpointError(
                        f"{path}: {what} differs from {first} of {source.experts[0]}; {CURE}"
                    )
            ema_used.append(bool(found.ema))
            yield _merged(path, found)
            on_file(path)

    config = _model_config(source, unet, decoder_config, facts)
    checkpoint = save_checkpoint(directory, config, states(), decoder, dtype=dtype, force=force)
    return Imported(checkpoint, unet, tuple(ema_used), facts)


def _first_expert(source: Published, decoder: AutoencoderConfig) -> tuple[UNetConfig | None, DiffusionFacts]:
    """Return the first expert's sizes and facts; CheckpointError if the decoder belongs to another model."""
    if not source.experts:
        return None, DiffusionFacts()
    found = _raw_unet(source.experts[0], source)
    if found.config.out_channels != decoder.embed_dim:
        raise CheckpointError(
            f"{source.experts[0]} predicts latents of {found.config.out_channels} channels, {source.decoder} "
            f"decodes {decoder.embed_dim}; give the decoder that belongs to the experts"
        )
    return found.config, found.facts


def _model_config(
    source: Published, unet: UNetConfig | None, decoder: AutoencoderConfig, facts: DiffusionFacts
) -> ModelConfig:
    family = "decoder" if unet is None else "moesr" if unet.space_experts else "ldm"
    return ModelConfig(
        name=source.name or f"{family}-x{source.scale}",
        scale=source.scale,
        unet=unet,
        decoder=decoder,
        schedule=facts.schedule,
        expert_ranges=split_timesteps(facts.schedule.timesteps, len(source.experts)),
    )


def split_timesteps(timesteps: int, experts: int) -> tuple[tuple[int, int], ...]:
    """Split the timesteps evenly: expert k of N serves [k T / N, (k + 1) T / N)."""
    edges = [k * timesteps // experts for k in range(experts + 1)] if experts else []
    return tuple(itertools.pairwise(edges))


@dataclass(frozen=True)
class _RawUNet:
    """A UNet's raw tensors, the tensors under the EMA prefix, its sizes and its facts."""

    raw: dict[str, Tensor]
    ema: dict[str, Tensor]
    config: UNetConfig
    facts: DiffusionFacts


def _merged(path: Path, found: _RawUNet) -> dict[str, Tensor]:
    """Return the weights of a UNet, its EMA weights if it has them, with merged space experts."""
    weights = ema_weights(path, found.raw, found.ema) if found.ema else found.raw
    check_finite(str(path), weights, CURE)
    return named(path, merge_space_experts, float32(weights))


def _raw_unet(path: Path, source: Published) -> _RawUNet:
    state = read_state_dict(path)
    prefix = UNET_PREFIX if any(key.startswith(UNET_PREFIX) for key in state) else ""
    ignored = (AUTOENCODER_PREFIX, EMA_PREFIX)
    raw = {
        key.removeprefix(prefix): tensor
        for key, tensor in state.items()
        if not key.startswith(ignored) and not SCHEDULE_BUFFER.fullmatch(key)
    }
    config = named(path, infer_unet_config, raw, source.head_channels, source.norm_groups)
    check_shapes(str(path), state_shapes(raw), _shapes(path, ModelConfig(unet=config), "expert"), CURE)
    ema = {k.removeprefix(EMA_PREFIX): v for k, v in state.items() if k.startswith(EMA_PREFIX)}
    return _RawUNet(raw, ema, config, diffusion_facts(path, state))


def read_autoencoder(path: Path, norm_groups: int) -> tuple[dict[str, Tensor], AutoencoderConfig]:
    """Read an autoencoder, in a file of a whole LDM under `first_stage_model.`, and infer its sizes."""
    state = read_state_dict(path)
    whole = any(key.startswith(AUTOENCODER_PREFIX) for key in state)
    # Training checkpoints of the autoencoder also hold a perceptual network and a discriminator (`loss.`).
    ignored = (UNET_PREFIX, EMA_PREFIX) if whole else ("loss.",)
    found = {
        key.removeprefix(AUTOENCODER_PREFIX): tensor
        for key, tensor in state.items()
        if not key.startswith((*ignored, f"{AUTOENCODER_PREFIX}loss."))
        and not (whole and SCHEDULE_BUFFER.fullmatch(key))
    }
    config = named(path, infer_autoencoder_config, found, norm_groups)
    expected = _shapes(path, ModelConfig(decoder=config), "decoder")
    found = with_counters(found, expected)
    check_shapes(str(path), state_shapes(found), expected, CURE)
    check_finite(str(path), found, CURE)
    return float32(found), config


def ema_weights(path: Path, raw: StateDict, ema: StateDict) -> dict[str, Tensor]:
    """Return the EMA copy of every weight in `raw`; its key is the weight's name without dots."""
    lead = "diffusion_model" if any(key.startswith("diffusion_model") for key in ema) else ""
    names = {key: lead + key.replace(".", "") for key in raw}
    expected = {names[key]: tuple(tensor.shape) for key, tensor in raw.items()}
    counters = {"decay", "num_updates"}
    got = {key: shape for key, shape in state_shapes(ema).items() if key not in counters}
    check_shapes(f"{path}: EMA copies under {EMA_PREFIX}", got, expected, CURE)
    return {key: ema[name] for key, name in names.items()}


def _shapes(path: Path, config: ModelConfig, kind: str) -> dict[str, tuple[int, ...]]:
    return expected_shapes(config, str(path))[kind]
