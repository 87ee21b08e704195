"""Time forms of the AFF filter's transforms in ONNX Runtime: dense and factored products, the DFT operator.

Each row is one size. A cell holds the milliseconds of a forward and an inverse two-dimensional transform of
CHANNELS images on the CPU, the median of five runs. Each form must first reproduce the images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median

import benchlib.missing_extra  # noqa: F401
import numpy as np
import onnxruntime as ort
import torch
from benchlib.machine import machine_line

from moesr.export.graphs.builder import BuiltGraph, GraphBuilder, Value
from moesr.export.graphs.refinement import onnx_ops
from moesr.kernels.aff_filter import portable
from moesr.runtime.engine.graph_spec import BATCH
from moesr.runtime.system.relative_error import relative_l2

LIMIT = 1e-4  # relative L2 error of a round trip; the operator has 1e-5 if a side is not a power of two
FORMS = ("dense", "factored", "operator")


def main(argv: Sequence[str] | None = None) -> int:
    """Check and time every form at every size; the exit code is 1 if a form is wrong."""
    args = parser().parse_args(argv)
    print(machine_line(), file=sys.stderr)
    print("| size | channels | " + " | ".join(f"{form} (ms)" for form in FORMS) + " |")
    print("| --- " * (2 + len(FORMS)) + "|")
    for side in args.sizes:
        x = torch.randn(1, args.channels, side, side, generator=torch.Generator().manual_seed(side)).numpy()
        cells = []
        for form in FORMS:
            session = open_graph(round_trip(form, args.channels, side), args.threads)
            error = relative_l2(np.asarray(session.run(None, {"x": x})[0]), x)
            if not error < LIMIT:
                print(f"{form} at {side}: relative error {error:.1e}, at most {LIMIT:.0e}", file=sys.stderr)
                return 1
            cells.append(f"{milliseconds(session, x):.1f}")
        print(f"| {side} | {args.channels} | {' | '.join(cells)} |", flush=True)
    return 0


def round_trip(form: str, channels: int, side: int) -> BuiltGraph:
    """Build a graph that transforms [B, C, side, side] and transforms it back."""
    g = GraphBuilder(form)
    shape = (BATCH, channels, side, side)
    x = g.input("x", shape)
    if form == "operator":
        y = _operators(g, x, side)
    else:
        plan, ops = portable.make_plan(side, side, 1 if form == "dense" else None), onnx_ops(g)
        y = portable.irfft2(plan, portable.rfft2(plan, x, ops), ops)
    g.output("y", y)
    return g.finish()


def _operators(g: GraphBuilder, x: Value, side: int) -> Value:
    """Add the round trip with ONNX's DFT operator, whose last axis holds real and imaginary parts."""
    channels, row, column = x.size(1), np.array(3), np.array(2)
    h = g.op("DFT", g.reshape(x, 0, channels, side, side, 1), None, row, onesided=1)
    h = g.op("DFT", g.op("DFT", h, None, column), None, column, inverse=1)
    h = g.op("DFT", h, np.array(side), row, onesided=1, inverse=1)
    return g.reshape(h, 0, channels, side, side)


def open_graph(graph: BuiltGraph, threads: int) -> ort.InferenceSession:
    """Open a session on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def milliseconds(session: ort.InferenceSession, x: np.ndarray) -> float:
    """Return the median of five runs."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        session.run(None, {"x": x})
        found.append(1000 * (time.perf_counter() - begin))
    return median(found)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--sizes", type=int, nargs="+", default=[128, 256, 512], help="sides (default: 128 256 512)"
    )
    p.add_argument(
        "--channels",
        type=int,
        default=16,
        help="images per transform, a block of channels (default: 16)",
    )
    p.add_argument("--threads", type=int, default=0, help="threads (default: all cores)")
    return p


if __name__ == "__main__":
    sys.exit(main())
