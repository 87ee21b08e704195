"""Infer the sizes of a published network from the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from moesr.training.config import (
    AutoencoderConfig,
    StableSRUNetConfig,
    StructureConfig,
    TextConfig,
    UNetConfig,
)
from moesr.training.weights import CheckpointError, StateDict

TEXT_KEYS = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def infer_unet_config(
    state: StateDict, head_channels: int = UNetConfig.head_channels, norm_groups: int = UNetConfig.norm_groups
) -> UNetConfig:
    """Infer the sizes of a denoising UNet from its state dict (keys without prefix).

    The number of heads and of normalization groups does not appear in any shape, so both are arguments.
    Raises CheckpointError naming a missing tensor. Unknown keys are not an error here; the later check
    against the network of these sizes reports them.
    """
    half = _half_unet(state)
    _check_heads(half.attended, head_channels)
    return UNetConfig(
        half.in_channels,
        _shape(state, "out.2.weight")[0],
        half.width,
        half.channel_mult,
        half.res_blocks,
        half.attention_factors,
        head_channels,
        norm_groups,
        space_experts=_count(state, "middle_block.2.moe_blocks"),
    )


def infer_diffusion_unet_config(
    state: StateDict,
    head_channels: int = StableSRUNetConfig.head_channels,
    norm_groups: int = StableSRUNetConfig.norm_groups,
) -> StableSRUNetConfig:
    """Infer the sizes of Stable Diffusion's denoising UNet; see `infer_unet_config`."""
    return StableSRUNetConfig(
        **vars(infer_unet_config(state, head_channels, norm_groups)),
        text_channels=_shape(state, TEXT_KEYS)[1],
        structure_channels=0,
    )


def infer_stablesr_unet_config(
    state: StateDict,
    head_channels: int = StableSRUNetConfig.head_channels,
    norm_groups: int = StableSRUNetConfig.norm_groups,
) -> StableSRUNetConfig:
    """Infer the sizes of StableSR's denoising UNet; see `infer_unet_config`."""
    plain = infer_diffusion_unet_config(state, head_channels, norm_groups)
    structure = _shape(state, "middle_block.0.spade.mlp_shared.0.weight")[1]
    return dataclasses.replace(plain, structure_channels=structure)


def infer_structure_config(
    state: StateDict,
    head_channels: int = StableSRUNetConfig.head_channels,
    norm_groups: int = StructureConfig.norm_groups,
) -> StructureConfig:
    """Infer the sizes of a structure encoder; `head_channels` is the number at its narrowest level."""
    half = _half_unet(state)
    _check_heads([half.width], head_channels)
    return StructureConfig(
        half.in_channels,
        _shape(state, "fea_tran.0.in_layers.2.weight")[0],
        half.width,
        half.channel_mult,
        half.res_blocks,
        half.attention_factors,
        half.width // head_channels,
        norm_groups,
    )


def infer_text_config(state: StateDict, head_channels: int = StableSRUNetConfig.head_channels) -> TextConfig:
    """Infer the sizes of a text encoder from its state dict."""
    vocabulary, width = _shape(state, "model.token_embedding.weight")
    _check_heads([width], head_channels)
    return TextConfig(
        width=width,
        layers=_count(state, "model.transformer.resblocks"),
        heads=width // head_channels,
        vocabulary=vocabulary,
        tokens=_shape(state, "model.positional_embedding")[0],
    )


@dataclass(frozen=True)
class _HalfUNet:
    """Sizes found in the down levels and the middle block of a UNet."""

    in_channels: int
    width: int
    channel_mult: tuple[int, ...]
    res_blocks: int
    attention_factors: tuple[int, ...]
    attended: list[int]  # numbers of channels at which there is attention


def _half_unet(state: StateDict) -> _HalfUNet:
    width, in_channels = _shape(state, "input_blocks.0.0.weight")[:2]
    levels: list[list[int]] = [[]]  # output channels of the residual blocks of each level
    attention: set[int] = set()
    for i in range(1, _count(state, "input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in state:  # the downsampling that ends a level
            levels.append([])
            continue
        levels[-1].append(_shape(state, f"input_blocks.{i}.0.in_layers.2.weight")[0])
        if f"input_blocks.{i}.1.proj_out.weight" in state:
            attention.add(len(levels) - 1)
    if len({len(level) for level in levels}) > 1 or not levels[0]:
        counts = [len(level) for level in levels]
        raise CheckpointError(
            f"levels of input_blocks have {counts} residual blocks, expected the same in each"
        )
    middle = _shape(state, "middle_block.1.proj_out.weight")[0]
    return _HalfUNet(
        in_channels,
        width,
        channel_mult=tuple(level[0] // width for level in levels),
        res_blocks=len(levels[0]),
        attention_factors=tuple(2**level for level in sorted(attention)),
        attended=[middle, *(levels[i][0] for i in sorted(attention))],
    )


def _check_heads(attended: list[int], head_channels: int) -> None:
    """Raise CheckpointError if some attention's channels cannot be split into heads of `head_channels`."""
    over = [channels for channels in attended if channels % head_channels]
    if over:
        raise CheckpointError(
            f"attention over {over[0]} channels has no heads of {head_channels} (--head-channels)"
        )


def infer_autoencoder_config(
    state: StateDict, norm_groups: int = AutoencoderConfig.norm_groups
) -> AutoencoderConfig:
    """Infer the sizes of an autoencoder from its state dict (keys without prefix) and `norm_groups`.

    A state dict without a codebook is that of a KL autoencoder. Without an encoder the sizes are those of the
    decoder, whose last level is taken to have the multiplier 1. Raises CheckpointError naming a missing
    tensor.
    """
    if "decoder.conv_out.weight" in state and not any(key.startswith("encoder.") for key in state):
        channels, down, further = _shape(state, "decoder.conv_out.weight")[1], "decoder.up", 1
    else:
        channels, down, further = _shape(state, "encoder.conv_in.weight")[0], "encoder.down", 0
    mult = tuple(
        _shape(state, f"{down}.{i}.block.0.conv1.weight")[0] // channels for i in range(_count(state, down))
    )
    codebook = "quantize.embedding.weight"
    refinement: Literal["aff", "unet", "none"] = "none"
    filter_blocks = AutoencoderConfig.filter_blocks
    if any(key.startswith("decoder.unet_1.") for key in state):
        refinement = "unet"
        if "decoder.unet_1.conv1.filter.w1" in state:
            refinement, filter_blocks = "aff", _shape(state, "decoder.unet_1.conv1.filter.w1")[1]
    levels, blocks, growth = _fusion(state)
    return AutoencoderConfig(
        channels=channels,
        channel_mult=mult,
        res_blocks=_count(state, f"{down}.0.block") - further,
        z_channels=_shape(state, "decoder.conv_in.weight")[1],
        embed_dim=_shape(state, "post_quant_conv.weight")[1],
        codebook_size=_shape(state, codebook)[0] if codebook in state else 0,
        norm_groups=norm_groups,
        fusion_level=levels[0] if levels else None,
        fusion_count=len(levels) or AutoencoderConfig.fusion_count,
        fusion_blocks=blocks,
        fusion_growth=growth,
        refinement=refinement,
        filter_blocks=filter_blocks,
    )


def _fusion(state: StateDict) -> tuple[list[int], int, int]:
    """Return the levels with a fusion layer (possibly none), and the RRDBs and growth of these layers."""
    matches = [re.match(r"decoder\.fusion_layer_(\d+)\.", key) for key in state]
    levels = sorted({int(match[1]) for match in matches if match})
    blocks, growth = AutoencoderConfig.fusion_blocks, AutoencoderConfig.fusion_growth
    if levels:
        path = f"decoder.fusion_layer_{levels[0]}.encode_enc_2"
        blocks = _count(state, path)
        growth = _shape(state, f"{path}.0.rdb1.conv1.weight")[0] if blocks else growth
    return levels, blocks, growth


def _shape(state: StateDict, key: str) -> tuple[int, ...]:
    """Return the shape of a weight; CheckpointError if it is missing or has fewer than two dimensions."""
    if key not in state:
        raise CheckpointError(f"missing {key}")
    shape = tuple(state[key].shape)
    if len(shape) < 2 or 0 in shape:
        raise CheckpointError(f"{key} has shape {shape}, expected a weight with at least two dimensions")
    return shape


def _count(state: StateDict, path: str) -> int:
    """Return the length of the module list at `path`: one more than its highest index."""
    indices = (re.match(rf"{re.escape(path)}\.(\d+)\.", key) for key in state)
    return max((int(match[1]) + 1 for match in indices if match), default=0)
