"""Registers all kernels as PyTorch operators `torch.ops.moesr.*` on import."""

from moesr.kernels.aff_filter.operator import aff_filter
from moesr.kernels.attention.operator import attention, attention_packed
from moesr.kernels.group_norm_silu.operator import group_norm_silu
from moesr.kernels.inverted_residual.operator import inverted_residual
from moesr.kernels.sampler_step.operator import sampler_step
from moesr.kernels.tile_blend.operator import tile_blend
from moesr.kernels.tile_gather.operator import tile_gather
from moesr.kernels.vq_nearest.operator import vq_nearest

__all__ = [
    "aff_filter",
    "attention",
    "attention_packed",
    "group_norm_silu",
    "inverted_residual",
    "sampler_step",
    "tile_blend",
    "tile_gather",
    "vq_nearest",
]
