"""The registry's entry for blending tiles: plan, test cases and cost.

A batch of the test cases holds tiles of two canvases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import SIZES, Cost, Op, PlanBuffer, Shape, TritonLaunch, TritonPlan, cases
from moesr.kernels.tile_blend import reference
from moesr.runtime.sampling import tiles

COLUMNS = 7  # of the table, see kernel.py
BLOCK_H, BLOCK_W = 8, 64


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Plan one launch, whose kernel reads the addresses of the canvases from a table."""
    del arch
    sides = [_sides(shape, i) for i in (0, 1)]
    return TritonPlan(
        op="tile_blend",
        dtype=dtype,
        shape=dict(shape),
        buffers=(
            PlanBuffer("slots", "i64", ("slots", COLUMNS), "input"),
            PlanBuffer("tiles", dtype, ("slots", "channels", "height", "width"), "input"),
            PlanBuffer("weights", "fp32", ("height", "width"), "input"),
            *(PlanBuffer(f"weight_sum_{i}", "fp32", side, "input") for i, side in enumerate(sides)),
            *(PlanBuffer(f"sums_{i}", "fp32", ("channels", *side), "state") for i, side in enumerate(sides)),
            PlanBuffer("flags", "i32", (2,), "state"),
        ),
        launches=(
            TritonLaunch(
                "tile_blend",
                ("slots", "tiles", "weights", "height", "width"),
                ("cdiv(height, BLOCK_H) * cdiv(width, BLOCK_W)", "channels", "slots"),
                {"BLOCK_H": BLOCK_H, "BLOCK_W": BLOCK_W},
                fp_fusion=False,
            ),
        ),
        scalars={name: shape[name] for name in ("slots", "channels", "height", "width")},
    )


def _sides(shape: Shape, canvas: int) -> tuple[int, int]:
    tile = shape["height"]
    return (2 * tile - 3, 2 * tile + 5) if canvas == 0 else (tile, tile + 7)


def _origins(shape: Shape, canvas: int) -> list[tuple[int, int]]:
    return tiles.grid(*_sides(shape, canvas), shape["height"], shape["height"] // 4)


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """The slots alternate between the canvases, and neighboring tiles overlap; the third slot is empty."""
    generator = torch.Generator().manual_seed(seed)
    tile, channels = shape["height"], shape["channels"]
    weights = torch.from_numpy(tiles.gaussian_weights(tile))
    given: dict[str, Any] = {"weights": weights}
    for i in (0, 1):
        side = _sides(shape, i)
        given[f"weight_sum_{i}"] = torch.zeros(side)
        for y, x in _origins(shape, i):
            given[f"weight_sum_{i}"][y : y + tile, x : x + tile] += weights
        given[f"sums_{i}"] = torch.randn(channels, *side, generator=generator)
    batch = torch.randn(shape["slots"], channels, tile, tile, generator=generator)
    slots = []
    for i in range(shape["slots"]):
        index = i % 2 if i != 2 else -1
        origins = _origins(shape, max(index, 0))
        slots.append((index, *origins[i // 2 % len(origins)]))
    return {**given, "tiles": batch.to(DTYPES[dtype]), "slots": slots}


def prepare(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return copies of the sums, cleared flags, and the table with the index of each canvas; see `link`."""
    device = given["tiles"].device
    rows = [(index, 0, 0, 0, 0, y, x) for index, y, x in given["slots"]]
    return {
        **given,
        "sums_0": given["sums_0"].clone(),
        "sums_1": given["sums_1"].clone(),
        "flags": torch.zeros(2, dtype=torch.int32, device=device),
        "slots": torch.tensor(rows, dtype=torch.int64, device=device),
    }


def link(buffers: dict[str, Any]) -> None:
    """Replace the indices of the canvases by addresses and strides."""
    sums, weight_sums = [[buffers[f"{name}_{i}"] for i in (0, 1)] for name in ("sums", "weight_sum")]
    slots = buffers["slots"]
    slots.copy_(table(sums, weight_sums, buffers["flags"], slots[:, [0, 5, 6]].tolist()))


def table(
    sums: list[Tensor], weight_sums: list[Tensor], flags: Tensor, slots: list[tuple[int, int, int]]
) -> Tensor:
    """Return the kernel's table, int64 [slots, 7] on the CPU, for slots of (canvas, y, x)."""
    rows = []
    for index, y, x in slots:
        canvas, weight_sum = sums[index], weight_sums[index]
        flag = flags.data_ptr() + index * flags.element_size()
        row = (canvas.data_ptr(), weight_sum.data_ptr(), flag, *canvas.stride()[:2], y, x)
        rows.append(row if index >= 0 else (0,) * COLUMNS)
    return torch.tensor(rows, dtype=torch.int64)


def outputs(**given: Any) -> Mapping[str, Tensor]:
    """Return the results of the reference by buffer name."""
    sums, weight_sums = [[given[f"{name}_{i}"] for i in (0, 1)] for name in ("sums", "weight_sum")]
    sums, flags = reference.tile_blend(sums, weight_sums, given["tiles"], given["weights"], given["slots"])
    return {"sums_0": sums[0], "sums_1": sums[1], "flags": flags}


def cost(shape: Shape, dtype: str) -> Cost:
    """For each value of the batch, tile, weight, sum of weights and sum are read, and the sum is written."""
    values = shape["slots"] * shape["channels"] * shape["height"] * shape["width"]
    return Cost(bytes=values * (SIZES[dtype] + 8) + 8 * values // shape["channels"], flops=0)


def _shape(slots: int, channels: int, tile: int) -> dict[str, int]:
    return {"slots": slots, "channels": channels, "height": tile, "width": tile}


# The reference computes in float64 here; test_kernels_loop.py compares bit by bit with the host's float32.
TOLERANCES = {"fp32": 2e-7, "fp16": 2e-7, "bf16": 2e-7}
CHECKED = {"odd": _shape(12, 3, 13), "four_channels": _shape(5, 4, 16), "wide": _shape(3, 3, 70)}
DEPLOYED = {"latent128": _shape(8, 3, 128), "pixels512": _shape(2, 3, 512)}

OP = Op(
    name="tile_blend",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, TOLERANCES),
    deployed=cases(DEPLOYED, TOLERANCES),
    cost=cost,
    prepare=prepare,
    link=link,
)
