"""Options are refused by name, whatever their type."""

from __future__ import annotations

import os

import numpy as np
import pytest

from moesr.runtime import options
from moesr.runtime.errors import UsageError

CORES = os.cpu_count() or 256
REFUSED = [
    *((options.check_threads, "threads", value) for value in ("2", 1.5, 0, -1, 4 * CORES + 1, 100_000, True)),
    *((options.check_device, "device", value) for value in (5, "cpu:7", "CPU", "", "cuda:", "cuda:x", True)),
    *((options.check_fidelity, "fidelity", value) for value in ("1", 1.1, -0.1, float("nan"), True, None)),
    *((options.check_seed, "seed", value) for value in (-1, 2**64, 1.0, "1", None, False, np.float32(1))),
]


@pytest.mark.parametrize(("check", "name", "value"), REFUSED)
def test_refused(check, name: str, value: object):
    with pytest.raises(UsageError, match=f"{name} is "):
        check(value)


def test_taken():
    assert options.check_threads(None) is None
    assert options.check_threads(np.int64(2)) == 2
    assert options.check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
    assert [options.check_device(d) for d in (None, "cpu", "cuda", "cuda:1")] == [
        None,
        "cpu",
        "cuda",
        "cuda:1",
    ]
    assert [options.check_fidelity(f) for f in (0, 1, np.float32(0.5), np.int8(1))] == [0.0, 1.0, 0.5, 1.0]
    assert type(options.whole("steps", np.int16(3), 1, 5)) is int
