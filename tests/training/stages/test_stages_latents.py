"""The training set of stage 2 is made once, can be resumed, and is checked against the recipe."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny_training as tiny
import torch
from safetensors import safe_open

from moesr.runtime.errors import InputError, UsageError
from moesr.runtime.sampling.samplers import SAMPLERS, advance, coefficients
from moesr.runtime.sampling.schedule import Schedule
from moesr.training.loop import distributed
from moesr.training.losses.diffusion import sample
from moesr.training.seeded_random import SAMPLING, SampleRng
from moesr.training.stages import latents
from moesr.training.stages.common import degradation

RECIPE = tiny.recipe()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.crops(tiny.photographs(tmp_path_factory.mktemp("photos")))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.stage_1(tmp_path_factory.mktemp("experts") / "checkpoint", RECIPE)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)


def make(data, start, directory, recipe=RECIPE):
    latents.make(recipe, start, data, tiny.run(directory), directory, recipe.decoder.latents)


def test_latents_are_made_once_and_resumed(data, start, tmp_path, small_shards):
    make(data, start, tmp_path)
    shards = sorted(tmp_path.glob("shard_*"))
    assert [p.name for p in shards] == [f"shard_{i:05d}.safetensors" for i in range(3)]
    before = [p.read_bytes() for p in shards]
    stamps = [p.stat().st_mtime_ns for p in shards]
    shards[1].unlink()
    shards[2].write_bytes(before[2][:100])  # as if an older version had been cut off
    with pytest.raises(InputError, match=r"2 of 3 shards are missing; run moesr-train latents again"):
        latents.Triples(tmp_path, 0)
    make(data, start, tmp_path)
    assert [p.read_bytes() for p in shards] == before
    assert shards[0].stat().st_mtime_ns == stamps[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.json", *(p.name for p in shards)]


def test_division_of_shards_does_not_depend_on_finished_ones(
    data, start, tmp_path, small_shards, monkeypatch
):
    """Process 1 of 2 makes its shard although process 0 has finished its own before process 1 looks."""
    make(data, start, tmp_path / "whole")
    own = tmp_path / "own"
    own.mkdir()
    for name in ("set.json", "shard_00000.safetensors"):
        shutil.copy(tmp_path / "whole" / name, own)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "wait", lambda: None)
    make(data, start, own)
    assert sorted(p.name for p in own.glob("shard_*")) == [
        "shard_00000.safetensors",
        "shard_00001.safetensors",
    ]


def test_triples_hold_crop_lr_and_latent_of_one_sample(data, start, tmp_path, small_shards):
    make(data, start, tmp_path)
    triples = latents.Triples(tmp_path, None)
    for number in range(5):
        index, hr, lr, z = triples[number]
        assert int(index) == number
        assert torch.equal(hr, data.crop(number))
        assert torch.equal(lr, degradation(RECIPE)(hr[None], index[None])[0])
        assert z.shape == (3, 8, 8) and z.dtype == torch.float32
    with safe_open(tmp_path / "shard_00002.safetensors", framework="pt") as file:
        assert {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()} == {  # noqa: SIM118
            "lr": (1, 3, 8, 8),
            "latent": (1, 3, 8, 8),
            "hr": (1, 3, 32, 32),
        }
    drawn = latents.Triples(tmp_path, 0)
    assert len({drawn[i][3].sum().item() for i in range(40)}) == 5
    assert torch.equal(drawn[7][3], latents.Triples(tmp_path, 0)[7][3])


def test_a_latent_does_not_depend_on_its_batch(data, start, tmp_path, small_shards):
    make(data, start, tmp_path / "two")
    make(data, start, tmp_path / "one", tiny.recipe(decoder={"latent_batch": 1}))
    for number in range(5):
        torch.testing.assert_close(
            *(latents.Triples(tmp_path / name, None)[number][3] for name in ("one", "two")),
            rtol=1e-4,
            atol=1e-4,
        )


OTHERS = {
    "count": ({"decoder": {"latents": 6}}, "triples is 5, expected 6"),
    "degradation": ({"degradation": "blind"}, "degradation is 'bicubic', expected 'blind'"),
    "steps": ({"decoder": {"latent_steps": 3}}, "steps is 2, expected 3"),
}


@pytest.mark.parametrize(("changes", "message"), OTHERS.values(), ids=OTHERS)
def test_latents_made_with_other_settings_are_refused(changes, message, data, start, tmp_path):
    make(data, start, tmp_path)
    with pytest.raises(UsageError, match=message):
        make(data, start, tmp_path, tiny.recipe(**changes))
    with pytest.raises(UsageError, match=message):
        latents.open_set(tmp_path, tiny.recipe(**changes), start)


def test_set_made_with_another_seed_is_used_but_not_continued(data, start, tmp_path):
    make(data, start, tmp_path)
    other = tiny.recipe(seed=1)
    with pytest.raises(UsageError, match="seed is 0, expected 1"):
        make(data, start, tmp_path, other)
    own, others = (latents.open_set(tmp_path, recipe, start) for recipe in (tiny.recipe(), other))
    assert [own[i][0] for i in range(4)] == [others[i][0] for i in range(4)]
    assert any(not torch.equal(own[i][1], others[i][1]) for i in range(4))


def test_too_many_sampler_steps_are_refused(data, start, tmp_path):
    with pytest.raises(UsageError, match=r"decoder\.latent_steps: steps must be in 1\.\.1000"):
        make(data, start, tmp_path, tiny.recipe(decoder={"latent_steps": 1001}))


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["absent", "broken", "empty"])
def test_damaged_description_is_refused(content, start, tmp_path):
    if content is not None:
        (tmp_path / "set.json").write_text(content)
    with pytest.raises(InputError, match="not a set of latents"):
        latents.open_set(tmp_path, RECIPE, start)


def test_mixed_set_holds_a_share_of_encoder_latents(data, start, tmp_path, small_shards):
    """Sampled latents equal those of a set without encoder latents, and each sample is flagged."""
    mixed = tiny.recipe(decoder={"encoded_share": 0.5})
    make(data, start, tmp_path / "sampled")
    make(data, start, tmp_path / "mixed", mixed)
    encode = latents.encoder(start, tiny.CPU)
    sampled, both = (latents.Triples(tmp_path / name, None) for name in ("sampled", "mixed"))
    kinds = []
    for number in range(5):
        _, hr, _, z, encoded = both[number]
        with torch.inference_mode():
            want = encode(hr[None])[0] if encoded else sampled[number][3]
        torch.testing.assert_close(z, want, rtol=1e-4, atol=1e-4)
        kinds.append(bool(encoded))
    assert set(kinds) == {True, False}
    with pytest.raises(UsageError, match=r"encoded_share is 0\.5, expected None"):
        make(data, start, tmp_path / "mixed")


def test_without_experts_latents_of_other_crops_replace_sampled_ones(data, tmp_path):
    recipe = tiny.recipe(model={"unet": None}, decoder={"encoded_share": 0.5})
    start = tiny.first_stage(tmp_path / "first", recipe)
    make(data, start, tmp_path / "set", recipe)
    triples, encode = latents.Triples(tmp_path / "set", None), latents.encoder(start, tiny.CPU)
    with torch.inference_mode():
        made = encode(torch.stack([triples[i][1] for i in range(5)]))
    for number in range(5):
        _, _, _, z, encoded = triples[number]
        torch.testing.assert_close(z, made[number if encoded else number - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_latents_are_sampled_as_the_runtime_does(sampler, prediction):
    """The reference calls the runtime's `advance` step by step with a linear network."""
    schedule, rng = Schedule(), SampleRng(0, SAMPLING, [0])
    table = SAMPLERS[sampler].table(schedule, 6, ((0, 500), (500, 1000)))
    cond = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)

    def network(z: torch.Tensor, cond: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * z - 0.2 * cond + 1e-4 * t

    got = sample([network, network], cond, table, rng, prediction)
    again = SampleRng(0, SAMPLING, [0])
    z = again.normal(3, 4, 4).numpy()
    history, scratch = np.zeros_like(z), np.zeros_like(z)
    for step, t in enumerate(table.t.tolist()):
        c = coefficients(table, step, prediction)
        out = network(torch.from_numpy(z.copy()), cond, torch.tensor([t])).numpy()
        noise = again.normal(3, 4, 4).numpy() if c.c_noise else None
        advance(z, out, noise, c, scratch, history)
    np.testing.assert_allclose(got.numpy(), z, rtol=1e-4, atol=1e-4)
