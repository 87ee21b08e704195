"""The goldens in the project are the published ones, and our networks have the published tensors."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from conftest import REFERENCE, own_shapes
from make_diffusers_golden import OUT
from make_goldens import GOLDENS, STEMS, cut, digest
from stablesr import NETWORKS as STABLESR
from weights_of_names import weights

whole_set = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no reference data at {REFERENCE}")
NETWORKS = ("unet_w32", "unet_w160", "ldm_unet_w32", "decoder_c32", "decoder_c128")
NETWORKS += tuple(f"stablesr_{name}" for name in STABLESR)


@pytest.mark.parametrize("network", NETWORKS)
def test_names_and_shapes_are_the_published_ones(network):
    assert digest(own_shapes(network)) == json.loads((GOLDENS / "keys.json").read_text())[network]


def test_goldens_are_small():
    files = sorted(GOLDENS.iterdir())
    assert [f.name for f in files] == sorted([*(f"{stem}.npz" for stem in STEMS), OUT.name, "keys.json"])
    assert sum(f.stat().st_size for f in files) < 900_000


@whole_set
@pytest.mark.parametrize("stem", STEMS)
def test_goldens_are_cut_from_the_whole_set(stem):
    with np.load(REFERENCE / "golden" / f"{stem}.npz") as whole, np.load(GOLDENS / f"{stem}.npz") as small:
        want = cut(stem, whole)
        assert sorted(want) == sorted(small)
        for key, value in want.items():
            np.testing.assert_array_equal(small[key], value)
            assert small[key].dtype == value.dtype


@whole_set
@pytest.mark.parametrize("network", ["unet_w32", "decoder_c32", "stablesr_text_narrow"])
def test_weights_are_those_of_the_whole_set(network):
    spec = importlib.util.spec_from_file_location("reference_fill", REFERENCE / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = {key: tuple(shape) for key, shape in own_shapes(network).items()}
    want, got = module.fill_all(shapes, "salt"), weights(shapes, "salt")
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value)
        assert got[key].dtype == value.dtype
