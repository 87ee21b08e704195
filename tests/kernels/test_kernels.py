"""Every kernel matches its reference, in Triton's interpreter or, with TRITON_INTERPRET=0, on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moesr.kernels.check import errors
from moesr.kernels.interpreter import interpreted
from moesr.kernels.plan import Case, Op
from moesr.kernels.registry import OPS


def rows() -> list:
    """Return every case of every operator with a readable id; long cases are marked slow."""
    return [
        pytest.param(op, case, id=f"{op.name}-{case}", marks=[pytest.mark.slow] if case.slow else [])
        for op in OPS.values()
        for case in op.cases
    ]


@pytest.mark.parametrize(("op", "case"), rows())
def test_kernel_matches_reference(op: Op, case: Case):
    device = torch.device("cpu" if interpreted() else "cuda")
    for name, error in errors(op, case, device).items():
        assert error <= case.tolerance, f"{name}: {error:.2e} > {case.tolerance:.0e}"
