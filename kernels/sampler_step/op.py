"""The registry's entry for the sampler's step: plan, test cases and cost.

One launch advances jobs whose canvases differ in size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesr.kernels.plan import Cost, Op, PlanBuffer, Shape, TritonLaunch, TritonPlan, cases
from moesr.kernels.sampler_step import reference
from moesr.runtime.sampling.noise import INITIAL_NOISE

COLUMNS = 7  # of the table, see kernel.py

BLOCK = 128  # Philox blocks per pass of a program: 1024 elements
PROGRAMS = 128  # per job; a program makes several passes over a larger canvas
KEYS = ((2**64 - 1, 3), (42, INITIAL_NOISE))  # seed and step of the two jobs of the test cases


def plan(shape: Shape, dtype: str, arch: int) -> TritonPlan:
    """Plan one launch of a fixed grid, whose kernel reads addresses from a table. The third job is empty."""
    del arch
    sizes = _sizes(shape)
    return TritonPlan(
        op="sampler_step",
        dtype=dtype,
        shape=dict(shape),
        buffers=(
            PlanBuffer("jobs", "i64", ("jobs", COLUMNS), "input"),
            PlanBuffer("coefficients", dtype, (2, 6), "input"),
            *(PlanBuffer(f"z_{i}", dtype, size, "state") for i, size in enumerate(sizes)),
            *(PlanBuffer(f"sums_{i}", dtype, size, "state") for i, size in enumerate(sizes)),
            PlanBuffer("history_0", dtype, sizes[0], "state"),
        ),
        launches=(
            TritonLaunch(
                "sampler_step", ("jobs",), (str(PROGRAMS), "jobs"), {"BLOCK": BLOCK}, fp_fusion=False
            ),
        ),
        scalars={"jobs": shape.get("jobs", 3)},
    )


def _sizes(shape: Shape) -> list[tuple[int, int, int]]:
    c, h, w = (shape[name] for name in ("channels", "height", "width"))
    return [(c, h, w), (c, h + 3, w + 1)]


def inputs(shape: Shape, dtype: str, seed: int) -> dict[str, Any]:
    """Return two canvases, the first with a history. With `pure_noise` the second becomes noise, like x_T."""
    del dtype
    generator = torch.Generator().manual_seed(seed)
    rows = [[1.01, -0.2, 0.3, -0.4, 1.5, -1.1], [0.99, 0.1, 0.0, 9.0, 9.0, 9.0]]
    given: dict[str, Any] = {"coefficients": torch.tensor(rows)}
    for i, size in enumerate(_sizes(shape)):
        given[f"z_{i}"] = torch.randn(size, generator=generator)
        given[f"sums_{i}"] = torch.randn(size, generator=generator)
    given["history_0"] = torch.randn(_sizes(shape)[0], generator=generator)
    if shape.get("pure_noise"):
        given["coefficients"][1, :3] = torch.tensor([0.0, 0.0, 1.0])
    return given


def prepare(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return copies of the canvases, and space for the table."""
    copies = {name: value.clone() for name, value in given.items()}
    device = given["coefficients"].device
    return {**copies, "jobs": torch.zeros(3, COLUMNS, dtype=torch.int64, device=device)}


def link(buffers: dict[str, Any]) -> None:
    """Write the rows of the table."""
    rows = []
    for i, key in enumerate(KEYS):
        given = buffers[f"z_{i}"], buffers[f"sums_{i}"], buffers["coefficients"][i]
        rows.append((*given, *key, buffers.get(f"history_{i}")))
    buffers["jobs"][:2].copy_(table(rows))


def table(rows: Sequence[tuple[Tensor, Tensor, Tensor, int, int, Tensor | None]]) -> Tensor:
    """Return the kernel's table, int64 [jobs, 7] on the CPU.

    A row is (z, sums, coefficients, seed, step, history or None).
    """
    words = np.zeros((len(rows), COLUMNS), np.uint64)
    for row, (z, sums, coefficients, seed, step, history) in zip(words, rows, strict=True):
        row[:3] = z.data_ptr(), sums.data_ptr(), coefficients.data_ptr()
        row[3:6] = z.numel(), seed, step - INITIAL_NOISE
        row[6] = 0 if history is None else history.data_ptr()
    return torch.from_numpy(words.view(np.int64))


def outputs(coefficients: Tensor, **given: Tensor) -> Mapping[str, Tensor]:
    """Return the results of the reference by buffer name."""
    results = {}
    for i, key in enumerate(KEYS):
        history = given.get(f"history_{i}")
        moved = reference.sampler_step(given[f"z_{i}"], given[f"sums_{i}"], coefficients[i], *key, history)
        results[f"z_{i}"], results[f"sums_{i}"], kept = moved
        results |= {} if kept is None else {f"history_{i}": kept}
    return results


def cost(shape: Shape, dtype: str) -> Cost:
    """z, sums and history are read and written once; the README has the cost of the noise."""
    del dtype
    first, second = (int(np.prod(size)) for size in _sizes(shape))
    return Cost(bytes=24 * first + 16 * second, flops=0)


def _shape(channels: int, height: int, width: int, **extra: int) -> dict[str, int]:
    return {"channels": channels, "height": height, "width": width, **extra}


# Apart from the noise the reference is float64; test_kernels_loop.py compares with the host's float32.
TOLERANCES = {"fp32": 2e-7}
CHECKED = {
    "odd": _shape(3, 7, 5),
    "pure_noise": _shape(3, 9, 9, pure_noise=1),
    "several_passes": _shape(4, 61, 67, pure_noise=1),
}
DEPLOYED = {"latent128": _shape(3, 128, 128), "latent512": _shape(3, 512, 512)}

OP = Op(
    name="sampler_step",
    plan=plan,
    inputs=inputs,
    reference=outputs,
    cases=cases(CHECKED, TOLERANCES),
    deployed=cases(DEPLOYED, TOLERANCES),
    cost=cost,
    prepare=prepare,
    link=link,
)
