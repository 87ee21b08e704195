"""The counted costs are the paper's Table 6, and agree with torch's own counter."""

from __future__ import annotations

import dataclasses
import json

import flops
import pytest
import torch
from engines import build_engine
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moesr.runtime.manifest import Manifest
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet


@pytest.fixture(scope="module")
def costs() -> tuple[flops.Cost, flops.Cost]:
    return flops.measure_all(512)


@pytest.fixture(scope="module")
def by_name(costs) -> dict[tuple[str, str], flops.Row]:
    return {(r.model, r.convention): r for r in flops.rows(*costs, tile=512, steps=200)}


@pytest.mark.parametrize(
    ("model", "params_m", "step_t", "total_t", "source"),
    [
        ("LDM", 168.95, 0.1608, 33.43, "counted"),
        ("MoE-SR", 605.30, 0.1658, 35.47, "counted"),
        ("StableSR", 1409.11, 0.4162, 86.27, "published"),
    ],
)
def test_table_6(model, params_m, step_t, total_t, source, by_name):
    row = by_name[model, "paper"]
    got = round(row.params_m, 2), round(row.step_t, 4), round(row.total_t, 2), row.source
    assert got == (params_m, step_t, total_t, source)


def test_exact_counts_in_the_papers_convention(by_name):
    ldm, moe = by_name["LDM", "paper"], by_name["MoE-SR", "paper"]
    assert (ldm.step_t, ldm.total_t) == pytest.approx((0.160781, 200 * 0.160781 + 1.272443), rel=4e-6)
    assert (moe.step_t, moe.total_t) == pytest.approx((0.165815, 200 * 0.165815 + 2.304024), rel=4e-6)


def test_parameters(costs):
    ldm, moe = costs
    assert ldm.unet_params == pytest.approx(113.62e6, rel=1e-4)
    assert ldm.decoder_params == pytest.approx(55.33e6, rel=2e-4)
    assert moe.unet_params == pytest.approx(133.31e6, rel=1e-4)
    assert moe.decoder_params == pytest.approx(72.06e6, rel=1e-4)


def test_full_counts(costs, by_name):
    parts = flops.parts(costs[1])
    want = {
        "step": 0.16632,
        "decode: of these, fusion": 0.687,
        "decode: of these, refinement network": 0.344,
        "decode without FFTs": 2.591,
        "LR encoder, whole": 0.897,
    }
    assert {name: parts[name] for name in want} == pytest.approx(want, abs=5e-4)
    row = by_name["MoE-SR", "full"]
    image = sum(parts[n] for n in ("decode without FFTs", "decode: FFTs", "LR encoder, whole"))
    assert row.total_t == pytest.approx(200 * parts["step"] + image)
    assert by_name["LDM", "full"].total_t == pytest.approx(33.80, abs=5e-3)  # no LR encoder, no filter


def test_the_fft_is_counted_as_it_says():
    from moesr.training.networks.refinement import AFFFilter

    layer = AFFFilter(16, 8)
    counts = flops.count(layer, lambda: layer(torch.zeros(1, 16, 8, 16)))
    assert counts["", "fft"] == 2 * 16 * 5 * 128 * 7 // 2  # two transforms, 16 channels, 5 N log2 N / 2


def test_agrees_with_torchs_counter():
    """An independent count by operator; it knows every product, a complex one as one of four, and no FFT."""
    tile = 96  # not a power of two
    unet = UNetConfig(width=64, res_blocks=1, space_experts=1)
    autoencoder = AutoencoderConfig(channels=64, res_blocks=1, fusion_blocks=1, codebook_size=512)
    cost = flops.measure(unet, autoencoder, tile)
    with FakeTensorMode(), torch.no_grad():
        network, first_stage = DenoisingUNet(unet).eval(), Autoencoder(autoencoder).eval()
        z, image = torch.empty(1, 3, tile // 4, tile // 4), torch.empty(1, 3, tile, tile)
        with FlopCounterMode(display=False) as step:
            network(z, z, torch.empty(1))
        with FlopCounterMode(display=False) as decode:
            first_stage.decode(z, image)
        with FlopCounterMode(display=False) as encoder:
            first_stage.encoder(image)
    assert step.get_total_flops() == 2 * flops.total(cost.step)
    unseen = flops.total(cost.decode, ("fft",)) + 3 * flops.total(cost.decode, ("filter",)) // 4
    assert decode.get_total_flops() == 2 * (flops.total(cost.decode) - unseen)
    assert encoder.get_total_flops() == 2 * flops.total(cost.encoder)


def test_counting_leaves_no_hooks_behind():
    layer = torch.nn.Linear(3, 5)
    assert flops.count(layer, lambda: layer(torch.zeros(2, 3))) == {("", "linear"): 30}
    assert not layer._forward_hooks


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict]:
    assert flops.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_json_at_another_tile_and_step_count(capsys, by_name):
    rows = {(r["model"], r["convention"]): r for r in run_json(capsys, "--tile", "256", "--steps", "50")}
    assert set(rows) == set(by_name)
    moe = rows["MoE-SR", "paper"]
    # Convolutions and tokens scale with the area; the layers of the time embedding do not.
    assert moe["step_t"] == pytest.approx(by_name["MoE-SR", "paper"].step_t / 4, rel=1e-3)
    assert moe["total_t"] == pytest.approx(50 * moe["step_t"] + 2.304024 / 4, rel=1e-6)
    assert (moe["tile"], moe["steps"], moe["source"]) == (256, 50, "counted")
    # Attention products grow with the square of the area.
    full = {name: r["step_t"] - rows[name, "paper"]["step_t"] for (name, c), r in rows.items() if c == "full"}
    whole = by_name["MoE-SR", "full"].step_t - by_name["MoE-SR", "paper"].step_t
    assert full["MoE-SR"] == pytest.approx(whole / 16)
    assert rows["StableSR", "paper"] == dataclasses.asdict(flops.PUBLISHED)  # still as published


def test_text_table_lines_up(costs, by_name):
    lines = flops.text(list(by_name.values()), *costs).splitlines()[:6]
    column = lines[0].index("source")
    assert [line[column:] for line in lines] == ["source", *["counted"] * 2, "published", *["counted"] * 2]


@pytest.mark.parametrize(
    "argv",
    [
        ["--tile", "500"],
        ["--tile", "0"],
        ["--tile", "-512"],
        ["--tile", "big"],
        ["--steps", "0"],
        ["--steps", "1001"],
    ],
    ids=" ".join,
)
def test_bad_options(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        flops.main(argv)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert argv[1] in message and "expected" in message


def test_engine_row(tmp_path):
    engine = build_engine(tmp_path, experts=2)
    manifest = Manifest.read(engine)
    cost = {"expert_0": (3_000_000, 2 * 10**9), "expert_1": (3_000_000, 2 * 10**9)}
    cost |= {"decoder": (1_000_000, 5 * 10**9)}
    graphs = {
        role: dataclasses.replace(graph, params=cost[role][0], macs=cost[role][1])
        for role, graph in manifest.graphs.items()
    }
    dataclasses.replace(manifest, graphs=graphs).write(engine)
    row = flops.engine_row(engine, steps=10)
    assert row == flops.Row("engine synthetic", 7.0, 0.002, 0.025, "full", "counted", tile=64, steps=10)


def test_unusable_engine(tmp_path, capsys):
    assert flops.main(["--engine", str(tmp_path)]) != 0
    assert "error: " in capsys.readouterr().err
