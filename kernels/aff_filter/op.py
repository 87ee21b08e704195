"""The registry's entry for the adaptive frequency filter: tiling, test cases and cost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moesr.kernels.aff_filter import reference, tables
from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import (
    SIZES,
    Cost,
    Op,
    PlanBuffer,
    Shape,
    TritonLaunch,
    TritonPlan,
    cases,
    next_power_of_2,
)

ON_CHIP = 8192  # complex values that the registers of a program hold: one column of a group of channels
DENSE = 64  # up to this height a column is one dense product; it is also the largest factor
DOT = 16  # the smallest inner size of a matrix product on tensor cores


class Columns(NamedTuple):
    """The sizes of the column pass; padded sizes are powers of two."""

    groups: int  # groups of channels, each of which is one program
    span: int  # channels per group: one block, or as many small blocks as fill the tensor cores
    channels: int  # span, padded
    n1: int  # H = n1 n2
    n2: int
    p1: int  # n1, padded
    p2: int


@cache
def column_tiling(channels: int, blocks: int, height: int) -> Columns:
    """Choose the factors with the least padding; ValueError if a factor is too large."""
    size = channels // blocks
    merge = max(d for d in range(1, max(1, DOT // size) + 1) if blocks % d == 0)
    padded = _pad(merge * size)
    factors = [(d, height // d) for d in range(2, height) if height % d == 0 and height > DENSE]
    n1, n2 = min(factors, key=lambda f: (_pad(f[0]) * _pad(f[1]), _pad(f[1]), f[1]), default=(1, height))
    p1, p2 = _pad(n1) if n1 > 1 else 1, _pad(n2)
    if max(p1, p2) > DENSE:
        raise ValueError(
            f"a height of {height} has the factors {n1} and {n2}, and the kernel takes at most {DENSE}; use "
            "another height, or the reference"
        )
    return Columns(blocks // merge, merge * size, padded, n1, n2, p1, p2)


def _pad(n: int) -> int:
    return max(DOT, next_power_of_2(n))


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Plan three launches.

    With `norm` 1 the filter's input is x times a scale plus a shift per plane, and x is added to the result.
    """
    channels, blocks, height, width = (shape[k] for k in ("channels", "blocks", "height", "width"))
    if width % 2:
        raise ValueError(f"the width must be even, got {width}")
    tiling = column_tiling(channels, blocks, height)
    planes = ("batch", channels, height, width)
    square = (2, tiling.groups, tiling.channels, tiling.channels)
    half = width // 2
    made = tables.row_tables(width) | tables.column_tables(tiling.n1, tiling.n2, tiling.p1, tiling.p2)
    return TritonPlan(
        op="aff_filter",
        dtype=dtype,
        shape=dict(shape),
        buffers=(
            PlanBuffer("x", dtype, planes, "input"),
            PlanBuffer("scale", "fp32", ("batch", channels), "input"),
            PlanBuffer("shift", "fp32", ("batch", channels), "input"),
            PlanBuffer("w1", dtype, square, "input"),
            PlanBuffer("b1", "fp32", square[:3], "input"),
            PlanBuffer("w2", dtype, square, "input"),
            PlanBuffer("b2", "fp32", square[:3], "input"),
            *(
                PlanBuffer(name, "fp32" if name == "twiddle" else dtype, table.shape, "table")
                for name, table in made.items()
            ),
            PlanBuffer("spectrum", dtype, ("batch", half + 1, channels, 2, height), "scratch"),
            PlanBuffer("y", dtype, planes, "output"),
        ),
        launches=_launches(shape, dtype, arch, tiling),
        scalars={"batch": shape["batch"]},
        tables=made,
    )


def _launches(shape: Shape, dtype: str, arch: int, tiling: Columns) -> tuple[TritonLaunch, ...]:
    channels, height, width = shape["channels"], shape["height"], shape["width"]
    even, odd = tables.cosines(width)
    precision = "tf32x3" if dtype == "fp32" else "ieee"
    rows, warps, stages = _row_tiling(height, width // 2, dtype, arch)
    common = {
        "CHANNELS": channels, "H": height, "W": width, "EVEN_COSINES": even, "ODD_COSINES": odd,
        "NORM": bool(shape.get("norm", 0)), "PRECISION": precision,
    }  # fmt: skip
    column = {
        "CHANNELS": channels, "GROUPS": tiling.groups, "SPAN": tiling.span, "H": height, "HALF": width // 2,
        "N1": tiling.n1, "N2": tiling.n2, "C": tiling.channels, "P1": tiling.p1, "P2": tiling.p2,
        "PRECISION": precision,
    }  # fmt: skip
    block_h, block_r, block_k = rows
    sizes = {"BLOCK_H": block_h, "BLOCK_K": block_k}
    tail = ("cdiv(H, BLOCK_H)", "batch * CHANNELS")
    return (
        TritonLaunch(
            "rows",
            ("x", "scale", "shift", "even", "odd", "spectrum"),
            ("cdiv(W // 2, BLOCK_R)", *tail),
            common | sizes | {"BLOCK_R": block_r},
            warps,
            stages,
        ),
        _column_launch(column, tiling, dtype, arch),
        TritonLaunch(
            "rows_inverse",
            ("spectrum", "even_inverse", "odd_inverse", "x", "scale", "shift", "y"),
            ("cdiv(W // 2, BLOCK_N)", *tail),
            common | sizes | {"BLOCK_N": block_r},
            warps,
            stages,
        ),
    )


def _column_launch(constants: dict[str, Any], tiling: Columns, dtype: str, arch: int) -> TritonLaunch:
    """Return the column pass: in registers if the column fits in half precision, else through the cache."""
    values = tiling.channels * tiling.p1 * tiling.p2
    arguments = ("spectrum", "w1", "b1", "w2", "b2", "dft_1", "dft_2", "twiddle")
    grid = ("HALF + 1", "GROUPS", "batch")
    if SIZES[dtype] == 2 and values <= ON_CHIP:
        return TritonLaunch("columns", arguments, grid, constants, max(4, values // 1024), 1)
    at_once = 2048 if arch in (90, 100) else 512  # complex values; more of them spill
    chunk = max(1, min(tiling.channels, at_once // (tiling.p1 * tiling.p2)))
    chunked = {"CHUNK": chunk, "FREQUENCIES": max(DOT, min(64, next_power_of_2(constants["H"])))}
    return TritonLaunch("columns_cached", arguments, grid, constants | chunked, 4, 1)


def _row_tiling(height: int, half: int, dtype: str, arch: int) -> tuple[tuple[int, int, int], int, int]:
    """Return (BLOCK_H, BLOCK_R or BLOCK_N, BLOCK_K), warps and stages of both row passes.

    A program keeps two accumulators of BLOCK_H x BLOCK_R. In half precision, registers and shared memory
    leave room for two programs or more per multiprocessor, so that one multiplies while another loads or
    stores. On sm_90 and sm_100 products read shared memory, which allows wider blocks.
    """
    asynchronous = arch in (90, 100)
    if SIZES[dtype] == 4:
        blocks = (64, 64, 32 if asynchronous else 16)
    else:
        blocks = (64, 128, 32) if asynchronous else (64, 64, 32)
    block_h, block_r, block_k = (_block(b, n) for b, n in zip(blocks, (height, half, half), strict=True))
    stages = 2 if not asynchronous else 4 if SIZES[dtype] == 4 else 3
    return (block_h, block_r, block_k), 4, stages


def _block(largest: int, n: int) -> int:
    """Return the largest block that divides n, or at most 32 with a masked remainder."""
    block = min(largest, _pad(n))
    while block > 32 and n % block:
        block //= 2
    return block


def prepare(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Pack the weights into one dense padded matrix per group; scale and shift default to 1 and 0."""
    x = inputs["x"]
    tiling = column_tiling(x.shape[1], inputs["w1"].shape[1], x.shape[2])
    ones = torch.ones(x.shape[:2], device=x.device)
    return {
        "x": x,
        "scale": inputs.get("scale", ones),
        "shift": inputs.get("shift", torch.zeros_like(ones)),
        "w1": pack_weight(inputs["w1"], tiling).to(x.dtype),
        "b1": pack_bias(inputs["b1"], tiling),
        "w2": pack_weight(inputs["w2"], tiling).to(x.dtype),
        "b2": pack_bias(inputs["b2"], tiling),
    }


def pack_weight(weight: Tensor, tiling: Columns) -> Tensor:
    """Pack [2, blocks, size, size] as [2, groups, C, C], with several blocks on the diagonal of a matrix."""
    size = weight.shape[2]
    packed = weight.new_zeros(2, tiling.groups, tiling.channels, tiling.channels)
    for i in range(tiling.span // size):
        at = slice(i * size, (i + 1) * size)
        packed[:, :, at, at] = weight[:, i :: tiling.span // size]
    return packed


def pack_bias(bias: Tensor, tiling: Columns) -> Tensor:
    """Pack [2, blocks, size] as float32 [2, groups, C]."""
    joined = bias.reshape(2, tiling.groups, tiling.span).float()
    return F.pad(joined, (0, tiling.channels - tiling.span)).contiguous()


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """Return normal values with a small mean, and weights that keep the variance."""
    generator = torch.Generator().manual_seed(seed)
    channels, blocks = shape["channels"], shape["blocks"]
    size = channels // blocks

    def draw(*dims: int, scale: float) -> Tensor:
        return scale * torch.randn(dims, generator=generator)

    plane = (shape["batch"], channels, shape["height"], shape["width"])
    values = {
        "x": draw(*plane, scale=1.0) + 0.05,
        "w1": draw(2, blocks, size, size, scale=size**-0.5),
        "b1": draw(2, blocks, size, scale=0.1),
        "w2": draw(2, blocks, size, size, scale=size**-0.5),
        "b2": draw(2, blocks, size, scale=0.1),
    }
    values = {name: v.to(DTYPES[dtype]) if name in ("x", "w1", "w2") else v for name, v in values.items()}
    if shape.get("norm", 0):
        values |= {"scale": 1 + draw(*plane[:2], scale=0.1), "shift": draw(*plane[:2], scale=0.1)}
    return values


def outputs(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Mapping[str, Tensor]:
    """Return the result of the reference; with a scale and a shift, x is added as an AFF block does."""
    if scale is None or shift is None:
        return {"y": reference.aff_filter(x, w1, b1, w2, b2)}
    normed = x * scale[..., None, None] + shift[..., None, None]
    return {"y": reference.aff_filter(normed, w1, b1, w2, b2) + x}


def baseline(**arguments: Tensor) -> Mapping[str, Tensor]:
    """Compute the filter as the network does without kernels, in float32 for any type of x."""
    y = outputs(**{name: value.float() for name, value in arguments.items()})["y"]
    return {"y": y.to(arguments["x"].dtype)}


def cost(shape: Shape, dtype: str) -> Cost:
    """Bytes: x is read twice, y is written, the spectrum is written and read twice. Flops: all products."""
    batch, channels, height, width = (shape[k] for k in ("batch", "channels", "height", "width"))
    tiling = column_tiling(channels, shape["blocks"], height)
    values, spectrum = height * width, height * (width + 2)
    rows = 2 * 2 * height * width * (width // 2)
    inner = (tiling.p1 if tiling.n1 > 1 else 0) + tiling.p2 + tiling.channels
    per_value = 2 * 8 * inner  # forward and back, or two layers; a complex product is 8 operations
    columns = (width // 2 + 1) * tiling.groups * tiling.channels * tiling.p1 * tiling.p2 * per_value
    moved = batch * channels * (3 * values + 4 * spectrum) * SIZES[dtype]
    return Cost(bytes=moved, flops=batch * (channels * rows + columns))


def _shape(batch: int, channels: int, blocks: int, height: int, width: int, **extra: int) -> dict[str, int]:
    return {
        "batch": batch, "channels": channels, "blocks": blocks, "height": height, "width": width, **extra
    }  # fmt: skip


TOLERANCES = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 1.5e-2}
HALF = {"fp16": TOLERANCES["fp16"]}
CHECKED = {
    "tiny": _shape(2, 4, 2, 6, 10),
    "odd_height": _shape(1, 24, 2, 15, 18),
    "prime_height": _shape(1, 16, 1, 37, 22),
    "norm": _shape(2, 16, 2, 24, 20, norm=1),
    "level512": _shape(1, 16, 1, 512, 6),
    "level256": _shape(1, 32, 1, 256, 6),
    "level128": _shape(1, 64, 2, 128, 6),
    "demo192": _shape(1, 16, 4, 192, 6),
    "demo48": _shape(1, 32, 4, 48, 24),
    "height1024": _shape(1, 4, 1, 1024, 4),
}
WIDE = {"width512": _shape(1, 4, 1, 2, 512)}
SQUARE = {
    "demo96": _shape(1, 32, 4, 96, 96),
    "demo192_whole": _shape(1, 16, 4, 192, 192),
    "block512": _shape(1, 16, 1, 512, 512),
}
# float16 and bfloat16 have the same tiling, and all float32 columns take the same kernel.
SLOW = {f"{name}-bf16" for name in ("level512", "level256", "level128", "demo192", "demo48", "height1024")}
SLOW |= {f"{name}-fp32" for name in ("level512", "level256", "height1024")}
DEPLOYED = {
    "full512": _shape(1, 128, 8, 512, 512),
    "full512_norm": _shape(1, 128, 8, 512, 512, norm=1),
    "full256": _shape(1, 256, 8, 256, 256),
    "full128": _shape(1, 256, 8, 128, 128),
    "demo192": _shape(1, 16, 4, 192, 192),
    "demo96": _shape(1, 32, 4, 96, 96),
    "demo48": _shape(1, 32, 4, 48, 48),
}

WIDER = {"full512": DEPLOYED["full512"]}

OP = Op(
    name="aff_filter",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, TOLERANCES, SLOW) + cases(WIDE, HALF) + cases(SQUARE, TOLERANCES, set(SQUARE)),
    deployed=cases(DEPLOYED, HALF) + cases(WIDER, {k: TOLERANCES[k] for k in ("bf16", "fp32")}),
    cost=cost,
    prepare=prepare,
    baseline=baseline,
    max_spill_bytes=48,  # float32 columns on sm_120; none in half precision at 512 px
)
