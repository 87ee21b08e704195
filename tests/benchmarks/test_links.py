"""benchmarks/links.py on a tiny model: scores of decoded latents, and the error of each expert."""

from __future__ import annotations

import dataclasses

import links
import numpy as np
import pytest
import tiny_training as tiny
from PIL import Image
from skimage import data

from moesr.training.checkpoint import load_checkpoint, save_checkpoint
from moesr.training.networks import Autoencoder

RECIPE = tiny.recipe()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hr")
    Image.fromarray(data.chelsea()[60:172, 100:230]).save(directory / "eye.png")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.stage_1(tmp_path_factory.mktemp("model") / "checkpoint", RECIPE).directory


@pytest.fixture(scope="module")
def fused(model, tmp_path_factory):
    """The same experts with a decoder that fuses LR features."""
    plain = load_checkpoint(model)
    config = dataclasses.replace(plain.config, decoder=RECIPE.model.decoder)
    experts = [plain.expert(k).state_dict() for k in range(len(config.expert_ranges))]
    decoder = Autoencoder(config.decoder).state_dict()
    return save_checkpoint(
        tmp_path_factory.mktemp("fused") / "checkpoint", config, experts, decoder
    ).directory


def rows(page: str) -> list[list[str]]:
    """Return the cells of every row of the page's tables, without the lines below the headers."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    return [cells for cells in lines if "---" not in cells[0]]


def test_both_tables_with_a_first_stage(fused, model, originals, tmp_path, capsys):
    out = tmp_path / "links.md"
    given = ["--model", str(fused), "--first-stage", str(model), "--hr", str(originals), "--side", "64"]
    assert links.main([*given, "-o", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.strip() == capsys.readouterr().out.strip()
    table = rows(page)
    names = [cells[0] for cells in table]
    assert {"bicubic", "encoder's latent, first stage", "zeros, decoder at fidelity 0"} <= set(names)
    errors = table[names.index("Expert") + 1 :]
    assert [cells[0] for cells in errors] == ["0"] * 3 + ["1"] * 3
    assert [int(cells[1]) for cells in errors] == [0, 249, 499, 500, 749, 999]
    # the estimate from the LR image alone is x0 at the last timestep
    assert errors[-1][3] == errors[0][4]


def test_decoder_without_lr_fusion_is_measured_once(model, originals, capsys):
    """The tiny model's checkpoint holds a plain decoder, like a model of plain latent diffusion."""
    given = ["--model", str(model), "--first-stage", str(model), "--hr", str(originals), "--side", "64"]
    assert links.main(given) == 0
    page = capsys.readouterr().out
    names = [cells[0] for cells in rows(page)]
    assert names[1:6] == [
        "bicubic",
        "encoder's latent, first stage",
        "encoder's latent, decoder",
        "sampled latent, decoder",
        "zeros, decoder",
    ]
    assert "no LR fusion. Checkpoint" in page


def test_rows_that_need_a_first_stage_are_left_out_without_one(model, originals, capsys):
    assert links.main(["--model", str(model), "--hr", str(originals), "--side", "64"]) == 0
    page = capsys.readouterr().out
    assert "not measured" in page
    assert not any("encoder" in cells[0] or cells[0] == "Expert" for cells in rows(page))


def test_crops_from_the_middle_fit_the_model(originals):
    (pair,) = links.pairs(str(originals), 4, 96)
    assert pair.hr.shape == (96, 96, 3) and pair.lr.shape == (24, 24, 3)
    whole = data.chelsea()[60:172, 100:230]
    np.testing.assert_array_equal(pair.hr, whole[8:104, 16:112])  # the original is first cut to 112 x 128


def test_model_without_experts_is_refused(tmp_path, originals, capsys):
    alone = tiny.first_stage(tmp_path / "first", RECIPE).directory
    assert links.main(["--model", str(alone), "--hr", str(originals)]) != 0
    assert "has no experts" in capsys.readouterr().err
