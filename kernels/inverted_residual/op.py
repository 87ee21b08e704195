"""The registry's entry for the inverted residual: tiling, test cases and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.inverted_residual import reference
from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import (
    MULTIPROCESSORS,
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

PROGRAMS = 2  # per multiprocessor
DOT = 16  # the smallest inner size of a matrix product on tensor cores


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Plan one launch over all tiles; with `channels_last` 1 it reads and writes [B, H, W, C]."""
    cin, cout, height, width = (shape[k] for k in ("channels", "out", "height", "width"))
    inner, nhwc = 4 * cin, shape.get("channels_last", 0)
    (gh, gw), chunk, block_c, warps = _tiling(cin, cout, dtype, arch)
    tiles = shape["batch"] * cdiv(height, gh - 2) * cdiv(width, gw - 2)

    def planes(channels: int) -> tuple[int | str, ...]:
        return ("batch", height, width, channels) if nhwc else ("batch", channels, height, width)

    def strides(channels: int) -> tuple[int, int]:
        return (channels, 1) if nhwc else (1, height * width)

    constants = {
        "CIN": cin, "INNER": inner, "COUT": cout, "H": height, "W": width,
        "X_PIXEL": strides(cin)[0], "X_CHANNEL": strides(cin)[1],
        "Y_PIXEL": strides(cout)[0], "Y_CHANNEL": strides(cout)[1],
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee", "GH": gh, "GW": gw, "CHUNK": chunk,
        "BLOCK_C": min(block_c, max(DOT, next_power_of_2(cin))), "CO": max(DOT, next_power_of_2(cout)),
    }  # fmt: skip
    buffers = (
        PlanBuffer("x", dtype, planes(cin), "input"),
        PlanBuffer("expand", dtype, (inner, cin), "input"),
        PlanBuffer("expand_bias", "fp32", (inner,), "input"),
        PlanBuffer("depthwise", dtype, (9, inner), "input"),
        PlanBuffer("depthwise_bias", "fp32", (inner,), "input"),
        PlanBuffer("reduce", dtype, (cout, inner), "input"),
        PlanBuffer("reduce_bias", "fp32", (cout,), "input"),
        PlanBuffer("scratch", dtype, ("programs", gh * gw, chunk), "scratch"),
        PlanBuffer("y", dtype, planes(cout), "output"),
    )
    arguments = (*(b.name for b in buffers), "batch")
    launch = TritonLaunch("inverted_residual", arguments, ("programs",), constants, warps, 1)
    return TritonPlan(
        op="inverted_residual",
        dtype=dtype,
        shape=dict(shape),
        scalars={"batch": shape["batch"], "programs": min(PROGRAMS * MULTIPROCESSORS[arch], tiles)},
        buffers=buffers,
        launches=(launch,),
    )


def _tiling(cin: int, cout: int, dtype: str, arch: int) -> tuple[tuple[int, int], int, int, int]:
    """Return the pixel grid, the wide channels and the input channels at a time, and the warps.

    The registers hold the outputs of the grid in float32. These are the largest tiles that do not spill.
    """
    asynchronous = arch in (90, 100)  # their matrix products read shared memory, not registers
    if SIZES[dtype] == 4:
        return ((8, 16), 16, 16, 8) if arch == 100 and cout <= 128 else ((8, 8), 16, 32, 8)
    block_c = 256 if cin <= 256 else 128  # a tile of x of up to 256 channels stays on the chip
    if asynchronous and not cin == cout > 128:
        return (8, 16), 32 if cout <= 128 else 16, block_c, 8
    return (8, 16) if cout <= 128 else (8, 8), 16, block_c, 8


def prepare(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrange the depthwise weights by tap, so that a tap's channels are contiguous; biases are float32."""
    packed = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    packed["depthwise"] = inputs["depthwise"].flatten(1).T.contiguous()
    return {name: v.float() if name.endswith("_bias") else v for name, v in packed.items()}


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """Return normal values, and weights that keep the variance in each layer."""
    generator = torch.Generator().manual_seed(seed)
    cin, cout, inner = shape["channels"], shape["out"], 4 * shape["channels"]

    def draw(*dims: int, scale: float) -> Tensor:
        return (scale * torch.randn(dims, generator=generator)).to(DTYPES[dtype])

    x = draw(shape["batch"], cin, shape["height"], shape["width"], scale=1.0)
    channels_last = bool(shape.get("channels_last", 0))
    return {
        "x": x.permute(0, 2, 3, 1).contiguous() if channels_last else x,
        "expand": draw(inner, cin, scale=cin**-0.5),
        "expand_bias": draw(inner, scale=0.5).float(),
        "depthwise": draw(inner, 3, 3, scale=1 / 3),
        "depthwise_bias": draw(inner, scale=0.5).float(),
        "reduce": draw(cout, inner, scale=inner**-0.5),
        "reduce_bias": draw(cout, scale=0.5).float(),
        "channels_last": channels_last,
    }


def outputs(x: Tensor, channels_last: bool = False, **weights: Tensor) -> Mapping[str, Tensor]:
    """Return the result of the reference by buffer name."""
    if not channels_last:
        return {"y": reference.inverted_residual(x, **weights)}
    return {"y": reference.inverted_residual(x.permute(0, 3, 1, 2), **weights).permute(0, 2, 3, 1)}


def cost(shape: Shape, dtype: str) -> Cost:
    """x is read and y is written once; the two matrix products."""
    pixels = shape["batch"] * shape["height"] * shape["width"]
    cin, cout = shape["channels"], shape["out"]
    return Cost(bytes=pixels * (cin + cout) * SIZES[dtype], flops=2.0 * pixels * 4 * cin * (cin + cout))


def _shape(batch: int, channels: int, out: int, height: int, width: int, **extra: int) -> dict[str, int]:
    return {
        "batch": batch, "channels": channels, "out": out, "height": height, "width": width, **extra
    }  # fmt: skip


TOLERANCES = {"fp32": 1e-5, "fp16": 1.5e-3, "bf16": 1e-2}
CHECKED = {
    "odd": _shape(2, 5, 5, 7, 9),
    "odd_wider": _shape(1, 12, 20, 17, 15),
    "odd_nhwc": _shape(2, 5, 7, 9, 7, channels_last=1),
    "demo48": _shape(1, 16, 16, 48, 48),
    "level": _shape(1, 128, 128, 16, 30),
    "narrower": _shape(1, 64, 32, 15, 15, channels_last=1),
}
SLOW = {f"{name}-{dtype}" for name in ("demo48", "level") for dtype in ("fp32", "bf16")}
DEPLOYED = {
    "full512": _shape(1, 128, 128, 512, 512),
    "full512_nhwc": _shape(1, 128, 128, 512, 512, channels_last=1),
    "full256_in": _shape(1, 128, 256, 256, 256),
    "full128": _shape(1, 256, 256, 128, 128),
    "full256_up": _shape(1, 512, 256, 256, 256),
    "full512_up": _shape(1, 256, 128, 512, 512),
    "demo192": _shape(1, 16, 16, 192, 192),
    "demo96_in": _shape(1, 16, 32, 96, 96),
    "demo48": _shape(1, 32, 32, 48, 48),
    "demo96_up": _shape(1, 64, 32, 96, 96),
    "demo192_up": _shape(1, 32, 16, 192, 192),
}

OP = Op(
    name="inverted_residual",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, TOLERANCES, SLOW),
    deployed=cases(DEPLOYED, {"fp16": TOLERANCES["fp16"]})
    + cases({"full512": DEPLOYED["full512"]}, {k: TOLERANCES[k] for k in ("bf16", "fp32")}),
    cost=cost,
    prepare=prepare,
    max_spill_bytes=20,  # 16 channels on sm_100, where 128 registers are taken; none at full width
)
