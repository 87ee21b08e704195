"""The registry's entry for resizing images: plan, test cases and cost.

`source` and `target` are codes of types, see `CODES`. The runtime looks the two passes up one by one, since
any type of source can be combined with any type of target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesr.kernels.image_resize import reference
from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import SIZES, Cost, Op, PlanBuffer, Shape, TritonLaunch, TritonPlan, cases
from moesr.runtime.images.resize import Passes, passes

BLOCK = 256
CODES = {1: "u8", 2: "u16", 3: "fp16", 4: "fp32"}
TOPS = {"u8": 255.0, "u16": 65535.0, "fp32": 0.0}


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Two launches; the second one runs along the other axis."""
    del arch
    made, source, target = _passes(shape), CODES[shape["source"]], CODES[shape["target"]]
    floating, rounds = source == "fp16" or (source == "fp32" != target), not shape["torch"]
    height, width = (made.size[0], shape["width"]) if made.rows_first else (shape["height"], made.size[1])
    tables = (made.vertical, made.horizontal) if made.rows_first else (made.horizontal, made.vertical)
    scalars: dict[str, int | float] = {
        "height": height, "width": width, "out_height": made.size[0], "out_width": made.size[1],
        "taps_1": tables[0].index.shape[1], "taps_2": tables[1].index.shape[1],
        "rows_1": int(made.rows_first), "rows_2": int(not made.rows_first),
        "offset": 0, "source_y": shape["width"] * 3, "source_x": 3, "source_c": 1,
        "target_y": made.size[1] * 3, "target_x": 3, "target_c": 1,
        "gain": 65535.0 if floating else 1.0, "levels": 65535.0 if floating else 0.0,
        "top_1": TOPS[target] * float(rounds), "top_2": TOPS[target],
    }  # fmt: skip
    first = ("source", "between", "index_1", "weight_1", "taps_1", "height", "width", "rows_1")
    second = ("between", "target", "index_2", "weight_2", "taps_2", "out_height", "out_width", "width")
    return TritonPlan(
        op="image_resize",
        dtype=dtype,
        shape=dict(shape),
        scalars=scalars,
        buffers=(
            PlanBuffer("source", source, (shape["height"], shape["width"], 3), "input"),
            *(
                PlanBuffer(f"{name}_{i}", kind, table.index.shape, "input")
                for i, table in enumerate(tables, 1)
                for name, kind in (("index", "i32"), ("weight", "i64"))
            ),
            PlanBuffer("between", "i64", (height, width, 3), "scratch"),
            PlanBuffer("target", target, (*made.size, 3), "output"),
        ),
        launches=(
            TritonLaunch(
                "first_pass",
                (*first, "offset", "source_y", "source_x", "source_c", "gain", "levels", "top_1"),
                ("cdiv(height * width * 3, BLOCK)",),
                {"BLOCK": BLOCK},
                fp_fusion=False,
            ),
            TritonLaunch(
                "second_pass",
                (*second, "rows_2", "target_y", "target_x", "target_c", "top_2"),
                ("cdiv(out_height * out_width * 3, BLOCK)",),
                {"BLOCK": BLOCK},
                fp_fusion=False,
            ),
        ),
    )


def _passes(shape: Shape) -> Passes:
    sizes = (shape["height"], shape["width"]), (shape["out_height"], shape["out_width"])
    return passes(*sizes, "torch" if shape["torch"] else "matlab")


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """Noise of the source's type."""
    rng, kind = np.random.default_rng(seed), CODES[shape["source"]]
    size = shape["height"], shape["width"], 3
    if kind in ("u8", "u16"):
        source = torch.from_numpy(rng.integers(0, int(TOPS[kind]) + 1, size, f"uint{8 * SIZES[kind]}"))
    else:
        source = torch.from_numpy(rng.random(size, np.float32)).to(DTYPES[kind])
    return {"source": source, "shape": shape}


def prepare(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the positions and weights of the taps."""
    made, device = _passes(given["shape"]), given["source"].device
    tables = (made.vertical, made.horizontal) if made.rows_first else (made.horizontal, made.vertical)
    found = {**given}
    for i, table in enumerate(tables, 1):
        found[f"index_{i}"] = torch.from_numpy(table.index.astype(np.int32)).to(device)
        found[f"weight_{i}"] = torch.from_numpy(np.ascontiguousarray(table.weight).view(np.int64)).to(device)
    return found


def outputs(source: Tensor, shape: Shape) -> Mapping[str, Tensor]:
    """The result of the reference by buffer name."""
    pixels, target = source.cpu().numpy(), CODES[shape["target"]]
    if target == "fp32":
        pixels = pixels.astype(np.float32)
    elif pixels.dtype.kind == "f":
        pixels = np.rint(pixels.clip(0, 1) * 65535).astype(np.uint16)
    convention = "torch" if shape["torch"] else "matlab"
    out = reference.image_resize(pixels, shape["out_height"], shape["out_width"], convention)
    return {"target": torch.from_numpy(out)}


def cost(shape: Shape, dtype: str) -> Cost:
    """The image read, the result written, and float64 values between the two launches."""
    size, out = shape["height"] * shape["width"], shape["out_height"] * shape["out_width"]
    between = min(shape["out_height"] * shape["width"], shape["height"] * shape["out_width"])
    types = SIZES[CODES[shape["source"]]], SIZES[CODES[shape["target"]]]
    return Cost(bytes=3.0 * (size * types[0] + 16 * between + out * types[1]), flops=0)


def _shape(source: int, target: int, size: tuple[int, int], out: tuple[int, int], torch_: int = 0) -> dict:
    names = "source", "target", "height", "width", "out_height", "out_width", "torch"
    return dict(zip(names, (source, target, *size, *out, torch_), strict=True))


CHECKED = {
    "enlarged_uint8": _shape(1, 1, (9, 7), (36, 28)),
    "reduced_uint16": _shape(2, 2, (23, 40), (9, 11)),
    "torch_uint16": _shape(2, 2, (8, 9), (16, 27), 1),
    "half": _shape(3, 2, (6, 5), (12, 20)),
    "float": _shape(4, 2, (6, 5), (6, 5)),
    "canvas": _shape(4, 4, (12, 16), (5, 16)),
}
DEPLOYED = {
    name: _shape(source, target, (512, 512), (2048, 2048))
    for name, source, target in (
        ("uint8", 1, 1), ("uint16", 2, 2), ("half", 3, 2), ("float", 4, 2), ("canvas", 4, 4)
    )
}  # fmt: skip

OP = Op(
    name="image_resize",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, {"fp32": 1e-7}),
    deployed=cases(DEPLOYED, {"fp32": 1e-7}),
    cost=cost,
    prepare=prepare,
)
