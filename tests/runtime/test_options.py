"""Invalid options of any type are refused with a message that names them."""

from __future__ import annotations

import os
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from moesr.runtime import options
from moesr.runtime.errors import UsageError

CORES = os.cpu_count() or 256
CHECKS = {
    **{f.__name__: f for f in (options.check_threads, options.check_seed, options.check_fidelity)},
    **{f.__name__: f for f in (options.check_reuse, options.check_guidance, options.check_device)},
    "one_of": lambda value: options.one_of("sampler", value, ("a", "b")),
    "check_flag": lambda value: options.check_flag("flag", value),
}


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


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


HOSTILE = {
    "4301 digits": 10**4300,
    "-4301 digits": -(10**4300),
    "400 digits": 10**400,
    "fraction": Fraction(10**400, 3),
    "infinite": float("inf"),
    "nan": float("nan"),
    "complex": 1j,
    "decimal": Decimal("1e999"),
    "array": np.zeros(2),
    "object": Unprintable(),
    "text": "9" * 10_000,
    "list": [1],
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_invalid_values_give_one_line(check, value: object):
    with pytest.raises(UsageError, match=r"^\w+ is .*, expected ") as caught:
        check(value)
    assert len(str(caught.value)) < 200


def test_valid_values_are_accepted():
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
