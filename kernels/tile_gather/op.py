"""The registry's entry for gathering tiles: plan, test cases and cost.

The cases gather a batch from two canvases of different sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import SIZES, Cost, Op, PlanBuffer, Shape, TritonLaunch, TritonPlan, cases
from moesr.kernels.tile_gather import reference

COLUMNS = 6  # of the table, see kernel.py
BLOCK_H, BLOCK_W = 8, 64
CANVAS_TYPES = {1: "u8", 2: "u16", 4: "fp32"}


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Plan one launch, whose kernel reads the addresses of the canvases from a table."""
    del arch
    return TritonPlan(
        op="tile_gather",
        dtype=dtype,
        shape=dict(shape),
        buffers=(
            PlanBuffer("slots", "i64", ("slots", COLUMNS), "input"),
            *(
                PlanBuffer(f"canvas_{i}", CANVAS_TYPES[shape["pixel_bytes"]], size, "input")
                for i, size in enumerate(_sizes(shape))
            ),
            PlanBuffer("tiles", dtype, ("slots", "channels", "height", "width"), "output"),
            PlanBuffer("t", "fp32", ("slots",), "output"),
        ),
        launches=(
            TritonLaunch(
                "tile_gather",
                ("slots", "tiles", "t", "height", "width"),
                ("cdiv(height, BLOCK_H) * cdiv(width, BLOCK_W)", "channels", "slots"),
                {
                    "PIXEL_BYTES": shape["pixel_bytes"],
                    "WITH_T": True,
                    "BLOCK_H": BLOCK_H,
                    "BLOCK_W": BLOCK_W,
                },
                fp_fusion=False,
            ),
        ),
        scalars={name: shape[name] for name in ("slots", "channels", "height", "width")},
    )


def _sizes(shape: Shape) -> list[tuple[int, int, int]]:
    """Return shapes of the two canvases: [C, H, W] for latents, [H, W, C] for images."""
    sides = [(2 * shape["height"] + 3, 2 * shape["width"] + 1), (shape["height"], shape["width"] + 7)]
    c = shape["channels"]
    return [(c, h, w) if shape["pixel_bytes"] == 4 else (h, w, c) for h, w in sides]


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """The slots alternate between the canvases; the third slot is empty."""
    generator = torch.Generator().manual_seed(seed)
    canvases = []
    for size in _sizes(shape):
        if shape["pixel_bytes"] == 4:
            canvases.append(torch.randn(size, generator=generator))
        else:
            kind = DTYPES[CANVAS_TYPES[shape["pixel_bytes"]]]
            canvases.append(torch.randint(0, torch.iinfo(kind).max + 1, size, generator=generator).to(kind))
    slots = []
    for i in range(shape["slots"]):
        index = i % 2 if i != 2 else -1
        spare = (shape["height"] + 3, shape["width"] + 1) if index == 0 else (0, 7)
        slots.append((index, i * 5 % (spare[0] + 1), i * 3 % (spare[1] + 1), 999 - 7 * i))
    return {"canvas_0": canvases[0], "canvas_1": canvases[1], "slots": slots, "shape": shape, "dtype": dtype}


def prepare(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the table with the index of each canvas in place of its address; `link` replaces it."""
    rows = [(index, 0, 0, y, x, t) for index, y, x, t in given["slots"]]
    device = given["canvas_0"].device
    return {**given, "slots": torch.tensor(rows, dtype=torch.int64, device=device)}


def link(buffers: dict[str, Any]) -> None:
    """Replace the indices of the canvases by addresses and strides."""
    buffers["slots"].copy_(
        table([buffers["canvas_0"], buffers["canvas_1"]], buffers["slots"][:, [0, 3, 4, 5]])
    )


def table(canvases: list[Tensor], slots: Tensor) -> Tensor:
    """Return the kernel's table, int64 [slots, 6] on the CPU, for slots [slots, 4] of (canvas, y, x, t)."""
    rows = []
    for index, y, x, t in slots.tolist():
        canvas = canvases[index]
        plane, row = canvas.stride()[:2] if canvas.is_floating_point() else (1, canvas.stride(0))
        rows.append((canvas.data_ptr(), plane, row, y, x, t) if index >= 0 else (0,) * COLUMNS)
    return torch.tensor(rows, dtype=torch.int64)


def outputs(canvas_0: Tensor, canvas_1: Tensor, slots: Any, shape: Shape, dtype: str) -> Mapping[str, Tensor]:
    """Return the results of the reference by buffer name."""
    size = shape["height"], shape["width"]
    tiles, t = reference.tile_gather([canvas_0, canvas_1], slots, *size, DTYPES[dtype])
    return {"tiles": tiles, "t": t}


def cost(shape: Shape, dtype: str) -> Cost:
    """Every value of the batch is read once and written once."""
    values = shape["slots"] * shape["channels"] * shape["height"] * shape["width"]
    return Cost(bytes=values * (shape["pixel_bytes"] + SIZES[dtype]), flops=0)


def _shape(slots: int, channels: int, height: int, width: int, pixel_bytes: int) -> dict[str, int]:
    return {
        "slots": slots, "channels": channels, "height": height, "width": width, "pixel_bytes": pixel_bytes
    }  # fmt: skip


# The kernel copies, or maps pixels in the host's order of operations, so the results are equal.
TOLERANCES = {"fp32": 0.0, "fp16": 0.0, "bf16": 0.0}
CHECKED = {
    "odd": _shape(4, 3, 9, 13, 4),
    "four_channels": _shape(2, 4, 16, 70, 4),
    "uint8": _shape(4, 3, 9, 13, 1),
    "uint16": _shape(4, 3, 9, 13, 2),
}
DEPLOYED = {
    "latent128": _shape(8, 3, 128, 128, 4),
    "lr512_uint8": _shape(2, 3, 512, 512, 1),
    "lr512_uint16": _shape(2, 3, 512, 512, 2),
}

OP = Op(
    name="tile_gather",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, TOLERANCES),
    deployed=cases(DEPLOYED, TOLERANCES),
    cost=cost,
    prepare=prepare,
    link=link,
)
