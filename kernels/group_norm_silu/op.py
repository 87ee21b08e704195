"""The registry's entry for GroupNorm + SiLU: plan, test cases and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.group_norm_silu import reference
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
    cdiv,
    next_power_of_2,
)

PARTS = 64  # parts per group (NCHW) at most; every block of the second launch reads a group's partials
PARTS_NHWC = 256  # parts per image (NHWC) at most


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Plan two launches. The tiling is the same on every architecture, since nothing needs shared memory."""
    del arch
    pixels, channels, groups = shape["height"] * shape["width"], shape["channels"], shape["groups"]
    if channels % groups:
        raise ValueError(f"{channels} channels cannot form {groups} groups; take a divisor")
    nhwc = shape.get("channels_last", 0)
    parts, launches = (_nhwc if nhwc else _nchw)(shape, pixels, channels // groups)
    sides = (shape["height"], shape["width"])
    dims = ("batch", *sides, channels) if nhwc else ("batch", channels, *sides)
    return TritonPlan(
        op="group_norm_silu",
        dtype=dtype,
        shape=dict(shape),
        buffers=(
            PlanBuffer("x", dtype, dims, "input"),
            PlanBuffer("weight", "fp32", (channels,), "input"),
            PlanBuffer("bias", "fp32", (channels,), "input"),
            PlanBuffer("partial", "fp32", ("batch", parts, groups, 2), "scratch"),
            PlanBuffer("y", dtype, dims, "output"),
        ),
        launches=launches,
        scalars={"batch": shape["batch"], "eps": reference.EPS},
    )


def _nchw(shape: Shape, pixels: int, width: int) -> tuple[int, tuple[TritonLaunch, ...]]:
    groups, size = shape["groups"], width * pixels
    block = min(4096, next_power_of_2(size))
    part = block * cdiv(size, PARTS * block)
    parts = cdiv(size, part)
    apply_block = min(4096, next_power_of_2(pixels))
    constants = {
        "CHANNELS": shape["channels"],
        "GROUPS": groups,
        "PIXELS": pixels,
        "PART": part,
        "PARTS": parts,
        "PARTS_PAD": next_power_of_2(parts),
        "SILU": bool(shape.get("silu", 1)),
        "BLOCK": apply_block,
    }
    return parts, (
        TritonLaunch(
            "statistics_nchw",
            ("x", "partial"),
            (f"batch * {groups}", str(parts)),
            {"SIZE": size, "PART": part, "BLOCK": block},
        ),
        TritonLaunch(
            "apply_nchw",
            ("x", "weight", "bias", "partial", "y", "eps"),
            ("batch * CHANNELS", "cdiv(PIXELS, BLOCK)"),
            constants,
        ),
    )


def _nhwc(shape: Shape, pixels: int, width: int) -> tuple[int, tuple[TritonLaunch, ...]]:
    groups, pad = shape["groups"], next_power_of_2(width)
    span = groups & -groups  # the largest power of two that divides the number of groups
    while span * pad > 512 and span > 1:
        span //= 2
    block = max(1, 4096 // (span * pad))
    part = block * cdiv(pixels, PARTS_NHWC * block)
    parts = cdiv(pixels, part)
    common = {
        "GROUPS": groups,
        "WIDTH": width,
        "WIDTH_PAD": pad,
        "PIXELS": pixels,
        "PART": part,
        "BLOCK": block,
        "SPAN": span,
    }
    second = {
        "PARTS": parts,
        "PARTS_PAD": next_power_of_2(parts),
        "SILU": bool(shape.get("silu", 1)),
        "RUN": part,
    }
    last = "GROUPS // SPAN"
    return parts, (
        TritonLaunch("statistics_nhwc", ("x", "partial"), ("batch", str(parts), last), common),
        TritonLaunch(
            "apply_nhwc",
            ("x", "weight", "bias", "partial", "y", "eps"),
            ("batch", "cdiv(PIXELS, RUN)", last),
            common | second,
        ),
    )


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """Return values with a mean of 3, which is ten times their standard deviation in the first group."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape["batch"], shape["channels"], shape["height"], shape["width"])
    x = torch.randn(size, generator=generator) + 3
    x[:, : shape["channels"] // shape["groups"]] *= 0.3
    channels_last = bool(shape.get("channels_last", 0))
    x = x.permute(0, 2, 3, 1).contiguous() if channels_last else x
    return {
        "x": x.to(DTYPES[dtype]),
        "weight": 1 + 0.1 * torch.randn(shape["channels"], generator=generator),
        "bias": 0.1 * torch.randn(shape["channels"], generator=generator),
        "groups": shape["groups"],
        "channels_last": channels_last,
        "silu": bool(shape.get("silu", 1)),
    }


def outputs(**arguments: Any) -> Mapping[str, Tensor]:
    """Return the result of the reference by buffer name."""
    return {"y": reference.group_norm_silu(**arguments)}


def cost(shape: Shape, dtype: str) -> Cost:
    """x is read twice, because no cache holds it between the launches, and y is written once."""
    values = shape["batch"] * shape["channels"] * shape["height"] * shape["width"]
    return Cost(bytes=3 * values * SIZES[dtype], flops=0)


def _shape(batch: int, channels: int, groups: int, height: int, width: int, **extra: int) -> dict[str, int]:
    return {
        "batch": batch, "channels": channels, "groups": groups, "height": height, "width": width, **extra
    }  # fmt: skip


TOLERANCES = {"fp32": 2e-6, "fp16": 1e-3, "bf16": 6e-3}
CHECKED = {
    "odd": _shape(2, 6, 3, 7, 5),
    "five_wide": _shape(1, 160, 32, 16, 16),
    "unet": _shape(1, 320, 32, 64, 64),
    "no_silu": _shape(1, 32, 8, 33, 31, silu=0),
    "odd_nhwc": _shape(2, 6, 3, 7, 5, channels_last=1),
    "five_wide_nhwc": _shape(1, 160, 32, 17, 16, channels_last=1),
    "unet_nhwc": _shape(2, 320, 32, 32, 32, channels_last=1),
    "no_silu_nhwc": _shape(1, 32, 8, 33, 31, channels_last=1, silu=0),
}
SLOW = {f"{name}-{dtype}" for name in ("unet", "unet_nhwc") for dtype in ("fp32", "bf16")}
DEPLOYED = {
    f"decoder{size}{name}": _shape(1, channels, 32, size, size, channels_last=last)
    for size, channels in ((512, 128), (256, 256), (128, 512))
    for last, name in ((0, ""), (1, "_nhwc"))
} | {
    f"unet{size}_nhwc": _shape(8, channels, 32, size, size, channels_last=1)
    for size, channels in ((128, 160), (64, 320), (32, 320), (16, 640))
}

OP = Op(
    name="group_norm_silu",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, TOLERANCES, SLOW),
    deployed=cases(DEPLOYED, {"fp16": TOLERANCES["fp16"]})
    + cases({"decoder512": DEPLOYED["decoder512"]}, {k: TOLERANCES[k] for k in ("bf16", "fp32")}),
    cost=cost,
)
