"""The registry's entry for the pixels of a result: plan, test cases and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.image_pixels import reference
from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import SIZES, Cost, Op, PlanBuffer, Shape, TritonLaunch, TritonPlan, cases

BLOCK = 512
CODES = {1: "u8", 2: "u16", 3: "fp16", 4: "fp32"}


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """One launch."""
    del arch
    height, width, channels = shape["height"], shape["width"], shape["channels"]
    scalars: dict[str, int | float] = {
        "height": height, "width": width, "channels": channels, "top": float(_top(shape)),
        "content_plane": height * width, "content_row": width,
        "offset": 0, "stride_y": width * channels, "stride_x": channels, "stride_c": 1,
    }  # fmt: skip
    sizes = ("height", "width", "content_plane", "content_row", "channels")
    arguments = "content", "colored", "target", *sizes, "offset", "stride_y", "stride_x", "stride_c", "top"
    return TritonPlan(
        op="image_pixels",
        dtype=dtype,
        shape=dict(shape),
        scalars=scalars,
        buffers=(
            PlanBuffer("content", "fp32", (3, height, width), "input"),
            PlanBuffer("colored", "i32", (1,), "input"),
            PlanBuffer("target", CODES[shape["target"]], (height, width, channels), "output"),
        ),
        launches=(
            TritonLaunch(
                "image_pixels", arguments, ("cdiv(height * width, BLOCK)",), {"BLOCK": BLOCK}, fp_fusion=False
            ),
        ),
    )


def _top(shape: Shape) -> int:
    return 255 if shape["target"] == 1 else 65535


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """Values of which some lie outside [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn((3, shape["height"], shape["width"]), generator=generator) * 0.6
    return {
        "content": content,
        "colored": torch.tensor([shape["colored"]], dtype=torch.int32),
        "shape": shape,
    }


def outputs(content: Tensor, colored: Tensor, shape: Shape) -> Mapping[str, Tensor]:
    """The result of the reference by buffer name."""
    grey, kind = not shape["colored"] or shape["channels"] == 1, CODES[shape["target"]]
    pixels = torch.from_numpy(reference.image_pixels(content.float().cpu().numpy(), _top(shape), grey))
    pixels = pixels[..., : shape["channels"]]
    return {"target": (pixels.float() / 65535 if kind[0] == "f" else pixels).to(DTYPES[kind])}


def cost(shape: Shape, dtype: str) -> Cost:
    """Every value is read once and written once."""
    sizes = 12 + shape["channels"] * SIZES[CODES[shape["target"]]]
    return Cost(bytes=float(shape["height"] * shape["width"] * sizes), flops=0)


def _shape(target: int, channels: int, colored: int, height: int, width: int) -> dict[str, int]:
    return {
        "target": target, "channels": channels, "colored": colored, "height": height, "width": width
    }  # fmt: skip


CHECKED = {
    "uint8": _shape(1, 3, 1, 9, 13),
    "uint16": _shape(2, 3, 1, 5, 40),
    "grey": _shape(1, 1, 0, 9, 13),
    "neutral": _shape(2, 3, 0, 7, 7),
    "half": _shape(3, 3, 1, 9, 13),
    "float": _shape(4, 3, 1, 9, 13),
}
DEPLOYED = {
    name: _shape(target, 3, 1, 2048, 2048)
    for name, target in (("uint8", 1), ("uint16", 2), ("half", 3), ("float", 4))
}

OP = Op(
    name="image_pixels",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, {"fp32": 2e-7}),
    deployed=cases(DEPLOYED, {"fp32": 2e-7}),
    cost=cost,
)
