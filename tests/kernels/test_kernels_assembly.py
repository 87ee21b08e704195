"""The kernels' machine code uses tensor cores, avoids local memory and rounds as it should; no GPU needed."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from moesr.kernels.build import compile_all, deployments
from moesr.kernels.plan import ARCHITECTURES, SHARED_BYTES
from moesr.kernels.registry import OPS

EXACT = ("vq_nearest", "tile_gather", "tile_blend", "sampler_step")
FUSED = re.compile(
    r"^\s*fma\.|\bmul\.f32|\badd\.f32|\bsub\.f32|\bmul\.f64|\badd\.f64|div\.(full|approx)", re.MULTILINE
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(deployment, compiled launches) of attention and the loop on every architecture."""
    every = list(deployments([OPS[name] for name in ("attention", *EXACT)], ARCHITECTURES))
    done = compile_all(((j, d.arch) for d in every for j in d.jobs), tmp_path_factory.mktemp("cache"))
    return [(d, [done[j, d.arch] for j in d.jobs]) for d in every]


@pytest.mark.slow
def test_attention_multiplies_on_tensor_cores_without_local_memory(compiled):
    for deployment, launches in compiled:
        if deployment.op.name == "attention":
            name = f"{deployment.case} sm_{deployment.arch}"
            for launch in launches:
                assert launch.resources.tensor_core > 0, f"{name}: no tensor-core instructions"
                assert launch.resources.local_in_loops == 0, name
                assert launch.resources.shared_bytes <= SHARED_BYTES[deployment.arch], name


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_exact_kernels_use_no_fused_multiply_add(compiled, name):
    for deployment, launches in compiled:
        if deployment.op.name == name:
            for launch in launches:
                assert not FUSED.search(launch.ptx.read_text()), f"{deployment.case} sm_{deployment.arch}"
                assert launch.resources.spill_bytes == 0
