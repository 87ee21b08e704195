"""Read weights of a text-to-image model's autoencoder and write them as a checkpoint directory.

Such an autoencoder is a KL autoencoder without codebook and LR image: that of Stable Diffusion, or the one
with a refinement network for Stable Diffusion 1.5 (MoE-SR, appendix D). Its files are state dicts in the
published layout, by themselves or inside a whole model under `first_stage_model.`, or in the layout of the
library diffusers. A file without the encoder's weights gives a decoder alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesr.training.checkpoint import Checkpoint, check_writable_as_checkpoint, save_checkpoint
from moesr.training.config import AutoencoderConfig, VaeConfig
from moesr.training.importing.diffusers_names import vae_state
from moesr.training.importing.files import AUTOENCODER_PREFIX, CURE, float32, named, read_state_dict
from moesr.training.importing.infer_config import infer_autoencoder_config
from moesr.training.importing.stable_diffusion import file_in
from moesr.training.weights import (
    CheckpointError,
    StateDict,
    check_finite,
    check_shapes,
    expected_shapes,
    state_shapes,
    with_counters,
)

DIFFUSERS = re.compile(r"(en|de)coder\.(mid_block|down_blocks|up_blocks)\.")
"""Keys that only the layout of diffusers has."""

ENCODER = ("encoder.", "quant_conv.")
"""Prefixes of the weights that only encoding needs."""

UNUSED = re.compile(r"loss\..*|model_ema\..*|logvar|.*\.position_ids")
"""Entries of training checkpoints that are no weights of the autoencoder."""


@dataclass(frozen=True)
class PublishedVae:
    """A published file, or a directory of diffusers, and properties that its tensors do not show."""

    path: Path
    name: str | None = None
    latent_scale: float | None = None  # None: from the configuration of diffusers, or Stable Diffusion's
    norm_groups: int = AutoencoderConfig.norm_groups


def is_vae(path: Path) -> bool:
    """Return True if a path holds the autoencoder of a text-to-image model.

    Raises CheckpointError if it cannot be read.
    """
    if not path.is_file():
        return path.is_dir()
    state = _autoencoder(read_state_dict(path))
    fused = any(key.startswith("decoder.fusion_layer_") for key in state)
    return "decoder.conv_in.weight" in state and "quantize.embedding.weight" not in state and not fused


def import_vae(
    source: PublishedVae,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    on_file: Callable[[Path], object] = lambda path: None,
) -> Checkpoint:
    """Write the checkpoint `directory` from a published file.

    `dtype` is the type of the stored weights; `on_file` is called with the file that was read. Raises
    CheckpointError naming a file that cannot be used, and OutputError if the directory cannot be written;
    after either error the directory is unchanged.
    """
    check_writable_as_checkpoint(directory, force)
    path, said = _located(source.path)
    state = _autoencoder(read_state_dict(path))
    on_file(path)
    encodes = any(key.startswith("encoder.") for key in state)
    if not encodes:
        state = {key: tensor for key, tensor in state.items() if not key.startswith(ENCODER)}
    decoder = named(path, infer_autoencoder_config, state, source.norm_groups)
    config = VaeConfig(
        name=source.name or f"kl-f{decoder.factor}",
        decoder=decoder,
        latent_scale=source.latent_scale or said or VaeConfig.latent_scale,
        encoder=encodes,
    )
    expected = expected_shapes(config, str(path))["decoder"]
    state = with_counters(state, expected)
    check_shapes(str(path), state_shapes(state), expected, CURE)
    check_finite(str(path), state, CURE)
    return save_checkpoint(directory, config, (), float32(state), dtype=dtype, force=force)


def _autoencoder(state: StateDict) -> dict[str, Tensor]:
    """Return the autoencoder's weights under their published names."""
    if any(key.startswith(AUTOENCODER_PREFIX) for key in state):
        state = {
            key.removeprefix(AUTOENCODER_PREFIX): tensor
            for key, tensor in state.items()
            if key.startswith(AUTOENCODER_PREFIX)
        }
    kept = {key: tensor for key, tensor in state.items() if not UNUSED.fullmatch(key)}
    return vae_state(kept) if any(DIFFUSERS.match(key) for key in kept) else kept


def _located(path: Path) -> tuple[Path, float | None]:
    """Return the weight file, and the scaling factor if a configuration of diffusers states one."""
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a published weight file")
        return path, None
    folder = path / "vae" if (path / "vae").is_dir() else path
    return file_in(folder), _scaling_factor(folder / "config.json")


def _scaling_factor(config: Path) -> float | None:
    """Read the scaling factor; CheckpointError for autoencoders whose latents are also shifted."""
    if not config.is_file():
        return None
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        shift, scale = values.get("shift_factor"), values.get("scaling_factor")
        scale = None if scale is None else float(scale)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config}: cannot be used ({error!r}); download it again") from error
    if shift:
        raise CheckpointError(
            f"{config}: shift_factor is {shift}; only autoencoders whose latents are scaled and not shifted "
            "are supported, such as those of Stable Diffusion 1, 2 and XL"
        )
    return scale
