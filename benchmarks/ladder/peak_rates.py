"""Measure the arithmetic peak rates of this CPU: the fastest matrix product of all installed libraries."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper

SIDE, RUNS = 2048, 8

KINDS = {
    "fp32": ("MatMul", np.float32, np.float32, np.float32),
    "int8": ("MatMulInteger", np.uint8, np.int8, np.int32),
}
"""By arithmetic: the ONNX operator and the types of its input, weights and output."""


def measure(threads: int, side: int = SIDE) -> dict[str, float]:
    """Return operations per second (two per multiply-accumulate) for "fp32", "bf16" and "int8"."""
    torch.set_num_threads(threads)
    rates = {
        "fp32": max(_of_torch(torch.float32, side), _of_onnx("fp32", threads, side)),
        "bf16": _of_torch(torch.bfloat16, side),
        "int8": _of_onnx("int8", threads, side),
    }
    return {name: 2 * side**3 * rate for name, rate in rates.items()}


def _of_torch(dtype: torch.dtype, side: int) -> float:
    a = torch.ones((side, side), dtype=dtype)
    return _products_a_second(lambda: torch.mm(a, a))


def _of_onnx(name: str, threads: int, side: int) -> float:
    """Return products per second with a constant matrix, which the library may pack ahead, like weights."""
    op, taken, held, given = KINDS[name]
    shape, x_values = (side, side), np.ones((side, side), taken)
    x, y = (
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)
        for n, kind in (("x", taken), ("y", given))
    )
    weights = onnx.numpy_helper.from_array(np.ones(shape, held), "w")
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"])], "product", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return _products_a_second(lambda: session.run(None, {"x": x_values}))


def _products_a_second(run: Callable[[], object]) -> float:
    """Return runs per second of the fastest of several runs."""
    run()
    best = 0.0
    for _ in range(RUNS):
        begin = time.perf_counter()
        run()
        best = max(best, 1 / (time.perf_counter() - begin))
    return best
