"""A few hundred examples per fuzz target; `python tests/attacks/fuzz.py` runs any number of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, run_example
from hypothesis import HealthCheck, given, settings

EXAMPLES = {"images": 150, "manifests": 80, "paths": 60, "cache": 20}


@pytest.mark.parametrize("name", EXAMPLES)
def test_fuzz_target(name: str):
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def check(value: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run_example(target, value, Path(folder))

    check()
