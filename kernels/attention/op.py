"""The registry's entry for attention: tilings, test cases and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesr.kernels.attention import reference
from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import SIZES, Cost, Op, PlanBuffer, Shape, TritonLaunch, TritonPlan, cases


class Tiling(NamedTuple):
    """The block sizes of one program; the README says what bounds them."""

    block_m: int  # queries
    block_n: int  # keys per step
    chunk: int  # channels per matrix product
    values: int  # output channels
    num_warps: int
    num_stages: int


def tiling(width: int, dtype: str, arch: int) -> Tiling:
    """Choose the blocks for a head width; ValueError unless it is a power of two from 16 to 512."""
    if width & (width - 1) or not 16 <= width <= 512:
        raise ValueError(f"the head's width must be a power of two from 16 to 512, got {width}; pad it")
    if width <= 64:
        return Tiling(64, 128 if arch == 100 and dtype != "fp32" else 64, width, width, 4, 2)
    if dtype == "fp32":
        return Tiling(16, 16, 64, width, 4, 1)
    if arch == 100:  # tensor memory holds 512 columns: those of the scores and 256 of the output
        return Tiling(128, 32, 128, min(width, 256), 8, 2)
    if arch == 90:  # 128 queries, 64 rows for each of the two warp groups
        return Tiling(128, 32, min(width, 256), min(width, 256), 8, 2)
    if arch == 80:
        return Tiling(64, 32, 128, width, 8, 2)
    return Tiling(32, 32, 64, width, 4, 2)  # 99 KiB of shared memory


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Plan one launch. Tokens and heads are scalars; `EVEN` (blocks divide the tokens) is compiled in."""
    width, last, packed = shape["width"], bool(shape.get("tokens_last", 0)), bool(shape.get("packed", 0))
    t = tiling(width, dtype, arch)
    constants = {
        "WIDTH": width,
        "VALUES": t.values,
        "CHUNK": t.chunk,
        "TOKENS_LAST": last,
        "PACKED": packed,
        "EVEN": shape["tokens"] % max(t.block_m, t.block_n) == 0,
        "BLOCK_M": t.block_m,
        "BLOCK_N": t.block_n,
    }
    names = ("qkv",) * 3 if packed else ("q", "k", "v")
    dims = (width, "tokens") if last else ("tokens", width)
    lead = ("heads", 3) if packed else ("heads",)
    return TritonPlan(
        op="attention",
        dtype=dtype,
        shape=dict(shape),
        buffers=(
            *(PlanBuffer(name, dtype, (*lead, *dims), "input") for name in dict.fromkeys(names)),
            PlanBuffer("out", dtype, ("heads", *dims), "output"),
        ),
        launches=(
            TritonLaunch(
                "attention",
                (*names, "out", "tokens", "scale"),
                ("cdiv(tokens, BLOCK_M)", "heads", "WIDTH // VALUES"),
                constants,
                t.num_warps,
                t.num_stages,
            ),
        ),
        scalars={"heads": shape["heads"], "tokens": shape["tokens"], "scale": width**-0.5},
    )


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """Return random heads; the queries are scaled up so that some rows attend to few keys."""
    generator = torch.Generator().manual_seed(seed)
    last = bool(shape.get("tokens_last", 0))
    dims = (shape["width"], shape["tokens"]) if last else (shape["tokens"], shape["width"])
    q, k, v = torch.randn(3, shape["heads"], *dims, generator=generator)
    q = 3 * q
    return {
        "q": q.to(DTYPES[dtype]),
        "k": k.to(DTYPES[dtype]),
        "v": v.to(DTYPES[dtype]),
        "scale": shape["width"] ** -0.5,
        "tokens_last": last,
    }


def prepare(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return both forms of the input; a plan uses the one that its buffers name."""
    q, k, v = given["q"], given["k"], given["v"]
    return {"q": q, "k": k, "v": v, "qkv": torch.stack([q, k, v], 1)}


def outputs(**arguments: Any) -> Mapping[str, Tensor]:
    """Return the result of the reference by buffer name."""
    return {"out": reference.attention(**arguments)}


def baseline(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens_last: bool) -> Tensor:
    """PyTorch's own attention."""
    if tokens_last:
        q, k, v = q.mT, k.mT, v.mT
    out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
    return out.mT.contiguous() if tokens_last else out


def cost(shape: Shape, dtype: str) -> Cost:
    """Two products of tokens x tokens x width per head."""
    values = shape["heads"] * shape["tokens"] * shape["width"]
    return Cost(bytes=4 * values * SIZES[dtype], flops=4 * values * shape["tokens"])


def _shape(heads: int, tokens: int, width: int, **extra: int) -> dict[str, int]:
    return {"heads": heads, "tokens": tokens, "width": width, **extra}


# On a GPU a float32 product is three tf32 products; the interpreter multiplies in float32.
TOLERANCES = {"fp32": 5e-6, "fp16": 5e-4, "bf16": 4e-3}
CHECKED = {
    "unet": _shape(5, 256, 32, tokens_last=1, packed=1),
    "unet_odd": _shape(3, 77, 32, tokens_last=1, packed=1),
    "short": _shape(2, 1, 32),
    "rows": _shape(2, 128, 64),
    "decoder": _shape(1, 128, 512, tokens_last=1),
    "decoder_odd": _shape(1, 145, 512, tokens_last=1),
    "decoder_rows": _shape(1, 128, 512),
    "decoder_rows_odd": _shape(2, 33, 512),
}
DEPLOYED = {
    "unet512": _shape(8 * 20, 256, 32, tokens_last=1, packed=1),
    "decoder512": _shape(1, 16384, 512, tokens_last=1),
    "decoder512_rows": _shape(1, 16384, 512),
}

OP = Op(
    name="attention",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, TOLERANCES),
    deployed=cases(DEPLOYED, TOLERANCES),
    cost=cost,
    prepare=prepare,
    baseline=baseline,
    max_spill_bytes=32,
)
