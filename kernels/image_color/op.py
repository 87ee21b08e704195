"""The registry's entry for color correction: plan, test cases and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesr.kernels.image_color import reference
from moesr.kernels.image_color.reference import METHODS
from moesr.kernels.plan import Cost, Op, PlanBuffer, Shape, TritonLaunch, TritonPlan, cases

BLOCK, CELL_BLOCK, PROGRAMS, LEVELS = 512, 256, 256, 5
NAMES = tuple(METHODS)
STYLES = {1: "u8", 2: "u16"}
CELLS, PIXELS = "cdiv(cells_h * cells_w, BLOCK)", "cdiv(height * width, BLOCK)"
IMAGES = ("height", "width", "content_plane", "content_row", "style_row", "cells_h", "cells_w")


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Find the clipped cells; then statistics and gains, or a difference that is blurred; then correct."""
    del arch
    height, width = shape["height"], shape["width"]
    cells = 3, -(-height // 4), -(-width // 4)
    scalars: dict[str, int | float] = {
        "height": height, "width": width, "cells_h": cells[1], "cells_w": cells[2],
        "content_plane": height * width, "content_row": width, "style_row": 3 * width,
        "down": 1, "right": 0, **{f"distance_{i}": 2**i for i in range(LEVELS)},
    }  # fmt: skip
    given = ("fade", "gain", "low")[shape["method"]]  # the method 0 reads nothing of it
    middle = [], _statistics(shape["pixel_bytes"]), _wavelet(shape["pixel_bytes"])
    return TritonPlan(
        op="image_color",
        dtype=dtype,
        shape=dict(shape),
        scalars=scalars,
        buffers=(
            PlanBuffer("style", STYLES[shape["pixel_bytes"]], (height, width, 3), "input"),
            PlanBuffer("content", "fp32", (3, height, width), "state"),
            PlanBuffer("colored", "i32", (1,), "state"),
            PlanBuffer("flags", "u8", cells, "scratch"),
            PlanBuffer("regions", "u8", cells, "scratch"),
            PlanBuffer("fade", "fp32", cells, "scratch"),
            *_between(shape),
        ),
        launches=(
            *_clipping(shape["pixel_bytes"]),
            *middle[shape["method"]],
            _launch(
                "correct", ("content", "style", "regions", "fade", given, *IMAGES), (PIXELS, "3"),
                BLOCK, METHOD=shape["method"], BYTES=shape["pixel_bytes"],
            ),
        ),
    )  # fmt: skip


def _between(shape: Shape) -> list[PlanBuffer]:
    """The buffers of a method: two planes to blur between, or partial sums and the gains."""
    if not shape["method"]:
        return []
    if shape["method"] == 2:
        size = 3, shape["height"], shape["width"]
        return [PlanBuffer(name, "fp32", size, "scratch") for name in ("low", "spare")]
    return [
        PlanBuffer("partial", "i64", (3, 5, PROGRAMS), "scratch"),
        PlanBuffer("gain", "fp32", (3, 2), "scratch"),
    ]


def _launch(
    function: str, arguments: tuple[str, ...], grid: tuple[str, ...], block: int, **constants: Any
) -> TritonLaunch:
    sizes = {"BLOCK": block} if block else {}
    return TritonLaunch(function, arguments, grid, {**constants, **sizes}, fp_fusion=False)


def _clipping(pixel_bytes: int) -> list[TritonLaunch]:
    sizes = ("cells_h", "cells_w")
    found = ("style", "flags", "colored", "height", "width", "style_row", *sizes)
    return [
        _launch("clip_cells", found, (CELLS,), CELL_BLOCK, BYTES=pixel_bytes),
        _launch("clip_regions", ("flags", "regions", *sizes), (CELLS, "3"), CELL_BLOCK),
        _launch("clip_fade", ("regions", "fade", *sizes), (CELLS, "3"), CELL_BLOCK),
    ]


def _statistics(pixel_bytes: int) -> list[TritonLaunch]:
    arguments = "content", "style", "regions", "partial", *IMAGES
    return [
        _launch(
            "statistics", arguments, (str(PROGRAMS), "3"), BLOCK, BYTES=pixel_bytes, PROGRAMS=PROGRAMS
        ),
        _launch("gains", ("partial", "gain"), ("3",), 0, PROGRAMS=PROGRAMS),
    ]  # fmt: skip


def _wavelet(pixel_bytes: int) -> list[TritonLaunch]:
    arguments = "content", "style", "regions", "low", *IMAGES
    launches = [_launch("difference", arguments, (PIXELS, "3"), BLOCK, BYTES=pixel_bytes)]
    for i in range(LEVELS):
        for ends, axis in ((("low", "spare"), "down"), (("spare", "low"), "right")):
            arguments = *ends, "height", "width", f"distance_{i}", axis
            launches.append(_launch("blur", arguments, (PIXELS, "3"), BLOCK))
    return launches


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """A noisy result over a smooth input, a corner of which is flat white, and another one black."""
    rng, (height, width) = np.random.default_rng(seed), (shape["height"], shape["width"])
    top = (1 << (8 * shape["pixel_bytes"])) - 1
    ramp = np.linspace(0.2, 0.7, width)[None, :, None] * np.ones((height, 1, 3)) + rng.random(3) * 0.1
    style = np.rint(ramp * top)
    if shape["clipped"]:
        style[: height // 2, : width // 3] = top
        style[height // 2 :, -width // 4 :, 1] = 0
    content = style.transpose(2, 0, 1) / top * 1.4 - 0.8 + 0.2 * rng.standard_normal((3, height, width))
    return {
        "content": torch.from_numpy(content.astype(np.float32)),
        "style": torch.from_numpy(style.astype(f"uint{8 * shape['pixel_bytes']}")),
        "shape": shape,
    }


def prepare(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the flag; the correction takes place in a copy."""
    flag = torch.zeros(1, dtype=torch.int32, device=given["style"].device)
    return {**given, "content": given["content"].clone(), "colored": flag}


def outputs(content: Tensor, style: Tensor, shape: Shape) -> Mapping[str, Tensor]:
    """The result of the reference by buffer name."""
    pixels, method = style.cpu().numpy(), NAMES[shape["method"]]
    corrected = reference.image_color(content.float().cpu().numpy(), pixels, method)
    colored = int((pixels != pixels[..., :1]).any())
    return {"content": torch.from_numpy(corrected), "colored": torch.tensor([colored], dtype=torch.int32)}


def cost(shape: Shape, dtype: str) -> Cost:
    """The result read and written, the input read twice, and the blurs or the statistics between."""
    pixels, between = 3.0 * shape["height"] * shape["width"], (0, 4, 4 + 8 * 2 * LEVELS)[shape["method"]]
    return Cost(bytes=pixels * (8 + 2 * shape["pixel_bytes"] + between), flops=0)


def _shape(height: int, width: int, pixel_bytes: int, method: int, clipped: int = 1) -> dict[str, int]:
    names = "height", "width", "pixel_bytes", "method", "clipped"
    return dict(zip(names, (height, width, pixel_bytes, method, clipped), strict=True))


CHECKED = {
    f"{method}_{size[0]}_{clip}": _shape(*size, method=METHODS[method], clipped=int(clip == "clip"))
    for method in METHODS
    for size, clip in (((41, 52, 1), "clip"), ((30, 37, 2), "plain"))
}
SLOW = frozenset(CHECKED) - {"adain_41_clip", "wavelet_41_clip"}
DEPLOYED = {
    f"{method}_uint{8 * size}": _shape(2048, 2048, size, METHODS[method])
    for method in METHODS
    for size in (1, 2)
}

OP = Op(
    name="image_color",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, {"fp32": 2e-6}, SLOW),
    deployed=cases(DEPLOYED, {"fp32": 2e-6}),
    cost=cost,
    prepare=prepare,
)
