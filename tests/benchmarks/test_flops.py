"""The counted costs match the paper's Table 6 and PyTorch's own counter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import flops
import pytest
import torch
from engines import build_engine
from stablesr import NARROW
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.errors import UsageError
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet, StableSRUNet, StructureEncoder, TextEncoder

LIGHT = Path(flops.__file__).parent / "models" / "light_decoder.json"


@pytest.fixture(scope="module")
def costs() -> tuple[flops.Cost, flops.Cost, flops.StableSRCost]:
    return flops.measure_all(512)


@pytest.fixture(scope="module")
def by_name(costs) -> dict[tuple[str, str], flops.Row]:
    return {(r.model, r.convention): r for r in flops.rows(*costs, tile=512, steps=200)}


@pytest.mark.parametrize(
    ("model", "convention", "params_m", "step_t", "total_t"),
    [
        ("LDM", "paper", 168.95, 0.1608, 33.43),
        ("MoE-SR", "paper", 605.30, 0.1658, 35.47),
        ("StableSR", "published", 1409.11, 0.4162, 86.27),
        ("StableSR", "paper", 1453.51, 0.4012, 83.29),
        ("StableSR", "full", 1453.51, 0.4826, 99.61),
    ],
)
def test_counts_match_table_6(model, convention, params_m, step_t, total_t, by_name):
    row = by_name[model, convention]
    assert (round(row.params_m, 2), round(row.step_t, 4), round(row.total_t, 2)) == (
        params_m,
        step_t,
        total_t,
    )


def test_exact_counts_of_stablesr(costs, by_name):
    cost = costs[2]
    params = {"UNet": 918.931, "structure encoder": 52.494, "text encoder": 354.033, "autoencoder": 128.048}
    assert {name: round(n / 1e6, 3) for name, n in cost.params.items()} == params
    assert cost.fusion_params == pytest.approx(44.394e6, rel=1e-5)
    conv_and_linear, all_kinds = flops.PAPER_KINDS, None
    for counts, kinds, tera in (
        (cost.step, conv_and_linear, 0.374907 + 0.026322),
        (cost.step, all_kinds, 0.437933 + 0.044714),
        (cost.text, conv_and_linear, 0.022284),
        (cost.text, all_kinds, 0.022564),
        (cost.encode, conv_and_linear, 0.541149),
        (cost.encode, all_kinds, 0.558329),
        (cost.decode, conv_and_linear, 2.482735),
        (cost.decode, all_kinds, 2.499914),
    ):
        assert flops.total(counts, kinds) / 1e12 == pytest.approx(tera, abs=1.5e-6)
    spade = sum(n for (name, _), n in cost.step.items() if ".spade." in name)
    assert spade / 1e12 == pytest.approx(0.0358, abs=5e-5)
    published = by_name["StableSR", "published"]
    assert published.step_t == pytest.approx(0.416224, abs=1e-6)
    assert published.total_t == pytest.approx(86.2686, abs=1e-4)
    assert published.params_m == pytest.approx(1409.111, abs=1e-3)


def test_stablesr_counts_match_pytorchs_counter():
    """The counter is independent, and the tile's resolutions are not powers of two."""
    tile, config = 192, NARROW
    cost = flops.measure_stablesr(config, tile)
    with FakeTensorMode(), torch.no_grad():
        unet, structure = StableSRUNet(config.unet).eval(), StructureEncoder(config.structure).eval()
        text, z, t = TextEncoder(config.text).eval(), torch.empty(1, 4, tile // 8, tile // 8), torch.empty(1)
        prompt = text(torch.zeros(1, 77, dtype=torch.int64))
        # the counter knows attention only as plain matrix products
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as step:
            unet(z, t, structure(z, t), prompt)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as encoded:
            text(torch.zeros(1, 77, dtype=torch.int64))
    assert step.get_total_flops() == 2 * flops.total(cost.step)
    assert encoded.get_total_flops() == 2 * flops.total(cost.text)


def test_exact_counts_by_the_papers_convention(by_name):
    ldm, moe = by_name["LDM", "paper"], by_name["MoE-SR", "paper"]
    assert (ldm.step_t, ldm.total_t) == pytest.approx((0.160781, 200 * 0.160781 + 1.272443), rel=4e-6)
    assert (moe.step_t, moe.total_t) == pytest.approx((0.165815, 200 * 0.165815 + 2.304024), rel=4e-6)


def test_parameters_match_table_6(costs):
    ldm, moe, _ = costs
    assert ldm.unet_params == pytest.approx(113.62e6, rel=1e-4)
    assert ldm.decoder_params == pytest.approx(55.33e6, rel=2e-4)
    assert moe.unet_params == pytest.approx(133.31e6, rel=1e-4)
    assert moe.decoder_params == pytest.approx(72.06e6, rel=1e-4)


def test_counts_by_the_full_convention(costs, by_name):
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
    # LDM has neither LR encoder nor filter
    assert by_name["LDM", "full"].total_t == pytest.approx(33.80, abs=5e-3)


def test_ffts_are_counted_by_the_stated_formula():
    from moesr.training.networks.refinement import AFFFilter

    layer = AFFFilter(16, 8)
    counts = flops.count(layer, lambda: layer(torch.zeros(1, 16, 8, 16)))
    assert counts["", "fft"] == 2 * 16 * 5 * 128 * 7 // 2  # two transforms, 16 channels, 5 N log2 N / 2


def test_counts_match_pytorchs_counter():
    """PyTorch's counter is independent. It counts a complex product as one of four real ones, and no FFT."""
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


def test_counting_removes_its_hooks():
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
    # Convolutions and token layers grow with the area; the time embedding does not.
    assert moe["step_t"] == pytest.approx(by_name["MoE-SR", "paper"].step_t / 4, rel=1e-3)
    assert moe["total_t"] == pytest.approx(50 * moe["step_t"] + 2.304024 / 4, rel=1e-6)
    assert (moe["tile"], moe["steps"]) == (256, 50)
    # Attention products grow with the square of the area.
    full = {name: r["step_t"] - rows[name, "paper"]["step_t"] for (name, c), r in rows.items() if c == "full"}
    whole = by_name["MoE-SR", "full"].step_t - by_name["MoE-SR", "paper"].step_t
    assert full["MoE-SR"] == pytest.approx(whole / 16)
    # The published figures encode the text in every step; its cost does not depend on the tile.
    step, ours = rows["StableSR", "published"]["step_t"], rows["StableSR", "paper"]["step_t"]
    whole = by_name["StableSR", "published"].step_t - by_name["StableSR", "paper"].step_t
    assert whole > step - ours > 23 * 77 * 8 * 1024**2 / 1e12


def test_columns_of_the_text_table_are_aligned(costs, by_name):
    lines = flops.text(list(by_name.values()), *costs).splitlines()[:8]
    column = lines[0].index("convention")
    words = [line[column:].split()[0] for line in lines]
    assert words == ["convention", *["paper"] * 3, *["full"] * 3, "published"]
    assert len({len(line) for line in lines}) == 1


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
def test_bad_options_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        flops.main(argv)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert argv[1] in message and "expected" in message


def test_row_of_an_engine(tmp_path):
    engine = build_engine(tmp_path, experts=2)
    manifest = read_manifest(engine)
    cost = {"expert_0": (3_000_000, 2 * 10**9), "expert_1": (3_000_000, 2 * 10**9)}
    cost |= {"decoder": (1_000_000, 5 * 10**9)}
    graphs = {
        role: dataclasses.replace(graph, params=cost[role][0], macs=cost[role][1])
        for role, graph in manifest.graphs.items()
    }
    write_manifest(dataclasses.replace(manifest, graphs=graphs), engine)
    row = flops.engine_row(engine, steps=10)
    assert row == flops.Row("engine synthetic", 7.0, 0.002, 0.025, "full", tile=64, steps=10)


def test_unusable_engine_is_reported(tmp_path, capsys):
    assert flops.main(["--engine", str(tmp_path)]) != 0
    assert "error: " in capsys.readouterr().err


def test_light_decoder_needs_a_tenth_of_the_published_one(costs):
    config = flops.read_model(LIGHT, 512)
    light, published = flops.model_cost(config, 512), costs[1]
    assert flops.total(light.decode) <= 0.1 * flops.total(published.decode)
    assert flops.total(light.step) == flops.total(published.step)


@pytest.mark.parametrize(
    ("content", "tile", "says"),
    [
        ("{", 512, "cannot be read"),
        ('{"decoder": {"chanels": 1}}', 512, "chanels"),
        ('{"unet": null}', 512, "expected a model with sampling experts"),
        ("{}", 500, "expected a multiple of 32"),
    ],
)
def test_wrong_configurations_are_refused(content, tile, says, tmp_path):
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(UsageError, match=says):
        flops.read_model(tmp_path / "model.json", tile)
