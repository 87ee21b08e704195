"""The registry's entry for the nearest code: plan, test cases and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import SIZES, Cost, Op, PlanBuffer, Shape, TritonLaunch, TritonPlan, cases, cdiv
from moesr.kernels.vq_nearest import reference

BLOCK_M, BLOCK_N = 16, 128  # latents and codes; larger blocks need registers that hide latency here


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Plan one launch. The tiling is the same on every architecture, since all of it stays in registers."""
    del arch
    width, out_width, codes = shape["width"], shape["out_width"], shape["codes"]
    padded = cdiv(codes, BLOCK_N) * BLOCK_N
    return TritonPlan(
        op="vq_nearest",
        dtype=dtype,
        shape=dict(shape),
        buffers=(
            PlanBuffer("z", dtype, ("batch", width, "pixels"), "input"),
            PlanBuffer("planes", "fp32", (width + 1, padded), "input"),
            PlanBuffer("table", "fp32", (codes, out_width), "input"),
            PlanBuffer("values", dtype, ("batch", out_width, "pixels"), "output"),
            PlanBuffer("indices", "i32", ("batch", "pixels"), "output"),
        ),
        launches=(
            TritonLaunch(
                "vq_nearest",
                ("z", "planes", "table", "values", "indices", "pixels"),
                ("cdiv(pixels, BLOCK_M)", "batch"),
                {
                    "WIDTH": width,
                    "OUT_WIDTH": out_width,
                    "CODES": padded,
                    "BLOCK_M": BLOCK_M,
                    "BLOCK_N": BLOCK_N,
                },
                fp_fusion=False,
            ),
        ),
        scalars={"batch": shape["batch"], "pixels": shape["height"] * shape["width_px"]},
    )


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """Every third code occurs twice and some latents equal a code, which gives exact ties."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape["codes"], shape["width"], generator=generator)
    codes[2::3] = codes[::3][: len(codes[2::3])]
    size = (shape["batch"], shape["width"], shape["height"], shape["width_px"])
    z = torch.randn(size, generator=generator)
    z[..., 0] = codes[shape["codes"] // 2].expand(shape["batch"], -1)[..., None]
    table = torch.randn(shape["codes"], shape["out_width"], generator=generator)
    return {"z": z.to(DTYPES[dtype]), "codes": codes, "table": table}


def planes(codes: Tensor) -> Tensor:
    """Return codes [codes, D] as the kernel reads them: [D + 1, codes filled up to full blocks]."""
    codes = codes.float()
    rows = torch.cat([-2.0 * codes.t(), reference.squared_norm(codes)[None]])
    filled = torch.zeros(len(rows), cdiv(len(codes), BLOCK_N) * BLOCK_N, device=codes.device)
    filled[-1] = float("inf")
    filled[:, : len(codes)] = rows
    return filled


def prepare(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Flatten the latents' pixels, and arrange the codes as planes."""
    return {"z": given["z"].flatten(2), "planes": planes(given["codes"]), "table": given["table"]}


def outputs(z: Tensor, codes: Tensor, table: Tensor) -> Mapping[str, Tensor]:
    """Return the results of the reference by buffer name, in float32 as the kernel computes them."""
    values, indices = reference.vq_nearest(z.float(), codes.float(), table.float())
    return {"values": values.flatten(2), "indices": indices}


def baseline(z: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the network's own form: a matrix product, then the smallest value of each row."""
    b, d, h, w = z.shape
    flat = z.permute(0, 2, 3, 1).reshape(-1, d)
    index = torch.argmin((codes * codes).sum(1) - 2 * flat @ codes.t(), dim=1)
    return table[index].reshape(b, h, w, -1).permute(0, 3, 1, 2), index.reshape(b, -1)


def cost(shape: Shape, dtype: str) -> Cost:
    """Bytes of the latents, the codes and the results, once each; tensor cores do not take part."""
    pixels = shape["batch"] * shape["height"] * shape["width_px"]
    read = pixels * shape["width"] * SIZES[dtype] + 4 * shape["codes"] * (shape["width"] + 1)
    return Cost(bytes=read + pixels * (shape["out_width"] * SIZES[dtype] + 4), flops=0)


def _shape(codes: int, batch: int, height: int, width_px: int, width: int, out_width: int) -> dict[str, int]:
    return {
        "codes": codes, "batch": batch, "height": height, "width_px": width_px, "width": width,
        "out_width": out_width,
    }  # fmt: skip


# The kernel follows the reference's order of operations, so all indices are equal.
TOLERANCES = {"fp32": 0.0}
CHECKED = {
    "odd": _shape(77, 2, 7, 5, 3, 3),
    "one_code": _shape(1, 1, 3, 2, 3, 3),
    "four_wide": _shape(256, 1, 16, 9, 4, 5),
    "codebook": _shape(8192, 1, 4, 16, 3, 3),
}
DEPLOYED = {"decoder512": _shape(8192, 1, 128, 128, 3, 3)}

OP = Op(
    name="vq_nearest",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=(
        *cases(CHECKED, TOLERANCES),
        *cases({"codebook": CHECKED["codebook"]}, {"fp16": 3e-4, "bf16": 2.4e-3}),
    ),
    deployed=cases(DEPLOYED, TOLERANCES),
    cost=cost,
    prepare=prepare,
    baseline=baseline,
)
