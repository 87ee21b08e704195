"""`moesr::vq_nearest` for PyTorch. It has no gradient: training passes gradients around the quantiser."""

from __future__ import annotations

import torch
from torch import Tensor

from moesr.kernels.dispatch import has_plan, run_buffers
from moesr.kernels.vq_nearest import reference
from moesr.kernels.vq_nearest.op import OP, planes


@torch.library.custom_op("moesr::vq_nearest", mutates_args=())
def vq_nearest(z: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of `table` [codes, E] for the nearest of `codes` [codes, D], and their indices.

    For `z` [B, D, h, w] they are [B, E, h, w] in the type of `z`, and int32 [B, h*w]. Of equally near codes
    the first one is chosen.
    """
    if z.ndim != 4 or codes.ndim != 2 or z.shape[1] != codes.shape[1] or len(table) != len(codes):
        got = f"z {tuple(z.shape)}, codes {tuple(codes.shape)}, table {tuple(table.shape)}"
        raise ValueError(f"z must be [B, D, h, w], codes [codes, D] and table [codes, E], got {got}")
    b, d, h, w = z.shape
    shape = {
        "codes": len(codes), "batch": b, "height": h, "width_px": w, "width": d, "out_width": table.shape[1]
    }  # fmt: skip
    if not has_plan(OP, shape, z):
        values, indices = reference.vq_nearest(z, codes.float(), table.float())
        return values.to(z.dtype), indices
    buffers = {"z": z.flatten(2), "planes": planes(codes), "table": table.float()}
    found = run_buffers(OP, shape, z, buffers, {})
    return found["values"].unflatten(2, (h, w)), found["indices"]


@vq_nearest.register_fake
def _(z: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    b, _, h, w = z.shape
    return z.new_empty(b, table.shape[1], h, w), z.new_empty(b, h * w, dtype=torch.int32)
