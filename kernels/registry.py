"""All operators that have kernels; the test suite, the build and the benchmark run over this table."""

from __future__ import annotations

from moesr.kernels.aff_filter.op import OP as AFF_FILTER
from moesr.kernels.attention.op import OP as ATTENTION
from moesr.kernels.group_norm_silu.op import OP as GROUP_NORM_SILU
from moesr.kernels.image_color.op import OP as IMAGE_COLOR
from moesr.kernels.image_pixels.op import OP as IMAGE_PIXELS
from moesr.kernels.image_resize.op import OP as IMAGE_RESIZE
from moesr.kernels.inverted_residual.op import OP as INVERTED_RESIDUAL
from moesr.kernels.plan import Op
from moesr.kernels.sampler_step.op import OP as SAMPLER_STEP
from moesr.kernels.tile_blend.op import OP as TILE_BLEND
from moesr.kernels.tile_gather.op import OP as TILE_GATHER
from moesr.kernels.vq_nearest.op import OP as VQ_NEAREST

DECODER = (AFF_FILTER, GROUP_NORM_SILU, INVERTED_RESIDUAL, ATTENTION, VQ_NEAREST)
LOOP = (TILE_GATHER, TILE_BLEND, SAMPLER_STEP)
IMAGES = (IMAGE_RESIZE, IMAGE_COLOR, IMAGE_PIXELS)
SHIPPED = LOOP + IMAGES
"""The operators whose kernels are installed with the package (see `ship`)."""

OPS: dict[str, Op] = {op.name: op for op in DECODER + SHIPPED}
