"""The goldens belong to the published networks, and our networks have the published tensors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, Golden, own_shapes
from make_diffusers_golden import OUT
from make_goldens import EVERY, GOLDENS, STEMS, WHOLE, cut, digest, digests, sample
from stablesr import NETWORKS as STABLESR
from weights_of_names import weights

NETWORKS = ("unet_w32", "unet_w160", "ldm_unet_w32", "decoder_c32", "decoder_c128")
NETWORKS += ("sd15_decoder_c32", "sd15_decoder_c128")
NETWORKS += tuple(f"stablesr_{name}" for name in STABLESR)


@pytest.mark.parametrize("network", NETWORKS)
def test_names_and_shapes_of_tensors_are_the_published_ones(network):
    assert digest(own_shapes(network)) == json.loads((GOLDENS / "keys.json").read_text())[network]


def test_goldens_are_small():
    files = sorted(GOLDENS.iterdir())
    assert [f.name for f in files] == sorted([*(f"{stem}.npz" for stem in STEMS), OUT.name, "keys.json"])
    assert sum(f.stat().st_size for f in files) < 3_500_000


@pytest.mark.parametrize("shape", [(3, 192, 160), (1, 4, 16, 24)], ids=["sampled", "complete"])
def test_results_are_compared_at_the_sampled_elements(shape):
    result = np.random.default_rng(0).standard_normal(shape, np.float32)
    data = Golden(out=sample(result))
    assert data["out"].shape == ((-(-result.size // EVERY),) if result.size > WHOLE else shape)
    assert data.error("out", result) == 0
    assert data.error("out", np.flip(result)) > 1
    with pytest.raises(ValueError):  # the result has another size
        data.error("out", result[..., :-1])


def test_sample_holds_every_row_column_and_channel():
    for at in np.indices((3, 192, 160)):
        assert np.array_equal(np.unique(sample(at)), np.unique(at))


@pytest.fixture
def reference() -> Path:
    if REFERENCE is None:
        pytest.skip("needs the whole set of reference data: set MOESR_REFERENCE")
    return REFERENCE


@pytest.mark.golden
def test_goldens_equal_the_sampled_reference_data(reference):
    for stem in STEMS:
        with np.load(reference / "golden" / f"{stem}.npz") as whole, np.load(GOLDENS / f"{stem}.npz") as kept:
            want = cut(stem, whole)
            assert sorted(want) == sorted(kept), stem
            for key, value in want.items():
                np.testing.assert_array_equal(kept[key], value, strict=True, err_msg=f"{stem}: {key}")
    assert json.loads((GOLDENS / "keys.json").read_text()) == digests(reference)


@pytest.mark.golden
def test_generated_weights_equal_the_reference_data(reference):
    spec = importlib.util.spec_from_file_location("reference_fill", reference / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for network in ("unet_w32", "decoder_c32", "stablesr_text_narrow"):
        shapes = {key: tuple(shape) for key, shape in own_shapes(network).items()}
        want, got = module.fill_all(shapes, "salt"), weights(shapes, "salt")
        for key, value in want.items():
            np.testing.assert_array_equal(got[key], value, strict=True, err_msg=f"{network}: {key}")
