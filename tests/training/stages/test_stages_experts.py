"""Stage 1: Space MoE and its weight sharing, ranges of timesteps, initial weights, and training in parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_training as tiny
import torch

from moesr.runtime.errors import InputError, UsageError
from moesr.training.checkpoint import Checkpoint, load_checkpoint
from moesr.training.loop import distributed
from moesr.training.loop.fit import fit
from moesr.training.loop.trainer import Trainer, read_state
from moesr.training.losses.diffusion import add_noise, denoising_loss, predict_x0
from moesr.training.networks import DenoisingUNet, SpaceMoE, share_expert_weights
from moesr.training.seeded_random import DIFFUSION, SampleRng
from moesr.training.stages import experts
from moesr.training.stages.common import first_stage_of

RECIPE = tiny.recipe()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tiny.photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.first_stage(tmp_path_factory.mktemp("vq") / "checkpoint", RECIPE)


def train(photos, directory, start, recipe=RECIPE, **options):
    experts.train(recipe, tiny.crops(photos), tiny.run(directory), start, **options)


def objective_of(recipe, start, t_range=None):
    first_stage = first_stage_of(recipe, start, tiny.run(Path()))
    return experts.prepare(recipe, first_stage, t_range)


@pytest.mark.parametrize("gamma", [0.999, 0.7, 0.0, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_sharing_is_equation_5(count, gamma):
    torch.manual_seed(count)
    moe = SpaceMoE(4, count).double()
    blocks = [list(block.parameters()) for block in moe.moe_blocks]
    before = [[p.detach().clone() for p in block] for block in blocks]
    places = [p.data_ptr() for block in blocks for p in block]
    share_expert_weights(moe, gamma)
    assert [p.data_ptr() for block in blocks for p in block] == places
    for i, block in enumerate(blocks):
        for j, p in enumerate(block):
            others = [before[k][j] for k in range(count) if k != i]
            want = gamma * before[i][j] + (1 - gamma) * sum(others) / (count - 1) if others else before[i][j]
            torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=1e-12)


def test_sharing_keeps_the_state_of_the_optimizer(photos, start, tmp_path):
    objective = objective_of(RECIPE, start, (0, 500))
    trainer = Trainer(objective, RECIPE.experts, tiny.CPU, 0)
    moe = next(m for m in objective.network.modules() if isinstance(m, SpaceMoE))
    weights = [block.get_parameter("0.weight") for block in moe.moe_blocks]
    places = [w.data_ptr() for w in weights]
    data = tiny.crops(photos)
    batch = [torch.stack(part) for part in zip(data[0], data[1], strict=True)]
    trainer.advance(iter([batch] * 2))
    moments = [trainer.optimiser.state[w]["exp_avg"].clone() for w in weights]
    spread = float((weights[0] - weights[1]).detach().norm())
    share_expert_weights(objective.network, 0.5)
    assert float((weights[0] - weights[1]).detach().norm()) == pytest.approx(spread * 0.25, rel=1e-4)
    assert [w.data_ptr() for w in weights] == places
    assert all(
        torch.equal(trainer.optimiser.state[w]["exp_avg"], m) for w, m in zip(weights, moments, strict=True)
    )


def test_sharing_follows_the_schedule(start, tmp_path):
    recipe = tiny.recipe(experts={"sharing": "ramp", "ramp_to": 1.0, "ramp_steps": 2})
    objective = objective_of(recipe, start)
    moe = next(m for m in objective.network.modules() if isinstance(m, SpaceMoE))
    first, *others = [block.get_parameter("0.weight").detach().clone() for block in moe.moe_blocks]
    objective.after_step(0)  # gamma is 0.5 after one of two steps
    want = 0.5 * first + 0.5 * sum(others) / 2
    torch.testing.assert_close(moe.moe_blocks[0].get_parameter("0.weight").detach(), want)


@pytest.mark.parametrize(("tokens", "count"), [((4, 4), 4), ((3, 5), 4), ((2, 1), 3)], ids=str)
def test_groups_partition_the_tokens(tokens, count):
    torch.manual_seed(0)
    moe = SpaceMoE(2, count).train()
    seen = []
    for i, block in enumerate(moe.moe_blocks):
        block.register_forward_hook(lambda m, args, out, i=i: seen.append((i, args[0])))
    h = torch.arange(2.0 * tokens[0] * tokens[1]).reshape(1, -1, 2)
    mixed = moe._split(h)
    groups = [group[0, :, 0] for _, group in seen]
    assert [i for i, _ in seen] == list(range(count))
    assert torch.equal(torch.cat(groups).sort().values, h[0, :, 0])
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for (i, group), part in zip(list(seen), groups, strict=True):
        rows = (part / 2).long()
        torch.testing.assert_close(mixed[0, rows], moe.moe_blocks[i](group)[0])
    seen.clear()
    moe._split(h)
    if count < tokens[0] * tokens[1]:
        assert not all(torch.equal(a, b[0, :, 0]) for a, (_, b) in zip(groups, seen, strict=True))


def test_timesteps_are_in_the_range_of_the_expert(start, photos, tmp_path):
    objective = objective_of(RECIPE, start, (500, 1000))
    seen = []
    objective.network.register_forward_hook(lambda m, args, out: seen.append(args[2]))
    data = tiny.crops(photos)
    for at in range(0, 64, 8):
        objective.loss([torch.arange(at, at + 8), data.crops(0, 8)], 0)
    t = torch.cat(seen)
    assert t.min() >= 500 and t.max() < 1000 and len(t.unique()) > 50


def test_clean_latents_are_recovered_from_the_noise():
    z, eps = torch.randn(3, 3, 4, 4, dtype=torch.float64), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    t, schedule = torch.tensor([0, 500, 999]), RECIPE.model.schedule
    z_t = add_noise(z, eps, t, schedule)
    torch.testing.assert_close(predict_x0(z_t, eps, t, schedule), z)
    want = z[1] * schedule.alpha_bar[500] ** 0.5 + eps[1] * (1 - schedule.alpha_bar[500]) ** 0.5
    torch.testing.assert_close(z_t[1], want)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_offset_noise_shifts_the_channel_means(offset):
    """For zero latents, z_t is scaled noise whose channel means have the standard deviation of the offset."""
    seen = []

    def network(z_t, cond, t):
        seen.append(z_t)
        return torch.zeros_like(z_t)

    z, schedule = torch.zeros(200, 3, 16, 16), tiny.recipe().model.schedule
    loss = denoising_loss(network, z, z, (999, 1000), schedule, SampleRng(0, DIFFUSION, range(200)), offset)
    assert float(loss) == pytest.approx(1 + offset**2, rel=0.1)  # the mean square of eps
    deviation = float(seen[0].mean(dim=(2, 3)).std())
    assert deviation == pytest.approx((offset**2 + 1 / 256) ** 0.5, rel=0.1)


def test_experts_trained_one_at_a_time_equal_those_of_one_run(photos, start, tmp_path):
    train(photos, tmp_path / "together", start)
    train(photos, tmp_path / "apart", start, expert=1)
    assert not (tmp_path / "apart" / "checkpoint").exists()
    train(photos, tmp_path / "apart", start, expert=0)
    together, apart = (load_checkpoint(tmp_path / name / "checkpoint") for name in ("together", "apart"))
    assert together.sha256() == apart.sha256()
    assert not tiny.same(together.expert(0).state_dict(), together.expert(1).state_dict())


def test_first_stage_is_loaded_once(photos, start, tmp_path, monkeypatch):
    reads = []
    decoder = Checkpoint.decoder
    monkeypatch.setattr(Checkpoint, "decoder", lambda self: (reads.append(self), decoder(self))[1])
    train(photos, tmp_path, start, tiny.recipe(experts={"base_steps": 1, "latent_pool": 3}))
    assert reads == [start]


def test_files_of_finished_experts_are_memory_mapped(photos, start, tmp_path, monkeypatch):
    """Only the averaged weights of a finished expert are read into memory."""
    train(photos, tmp_path, start, expert=1)
    load, opened = torch.load, {}
    monkeypatch.setattr(torch, "load", lambda path, **k: (opened.update({path: k}), load(path, **k))[1])
    train(photos, tmp_path, start, expert=0)
    assert opened[tmp_path / "expert_1" / "last.pt"]["mmap"]
    assert (tmp_path / "checkpoint").is_dir()


def test_all_processes_make_the_pool_if_one_lacks_it(photos, start, tmp_path, monkeypatch):
    """A process that finds the pool complete still joins the others; otherwise they would wait forever."""
    recipe = tiny.recipe(experts={"latent_pool": 3, "steps": 1})
    train(photos, tmp_path, start, recipe)
    objective, encoded = objective_of(recipe, start), []
    encode = objective.encode
    monkeypatch.setattr(objective, "encode", lambda batch: (encoded.append(1), encode(batch))[1])
    # as if another process lacked it
    monkeypatch.setattr(distributed, "any_process", lambda flag, device: True)
    experts.make_pool(objective, tiny.crops(photos), tiny.run(tmp_path), tmp_path / "latents.pt")
    assert encoded


def test_experts_start_from_the_base_network(photos, start, tmp_path):
    recipe = tiny.recipe(experts={"steps": 0, "base_steps": 2, "latent_pool": 3})
    train(photos, tmp_path, start, recipe)
    base = read_state(tmp_path / "base" / "last.pt")
    assert base["step"] == 2
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert tiny.same(loaded.expert(0).state_dict(), loaded.expert(1).state_dict())
    torch.testing.assert_close(loaded.expert(0).get_parameter("out.2.weight"), base["ema"]["out.2.weight"])


@pytest.mark.parametrize("space_experts", [3, 0], ids=["moe", "plain-ldm"])
@torch.no_grad()
def test_experts_start_from_a_checkpoint(space_experts, start, tmp_path):
    given = tiny.stage_1(tmp_path / "init", tiny.recipe(model={"unet": {"space_experts": space_experts}}))
    assert RECIPE.model.unet is not None
    network = DenoisingUNet(RECIPE.model.unet).eval()
    x = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([300])
    for k in range(2):
        network.load_state_dict(experts.initial_weights(RECIPE.model.unet, given, k))
        torch.testing.assert_close(network(*x), given.expert(k)(*x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network.train()(*x), given.expert(k)(*x), rtol=1e-4, atol=1e-5)
        network.eval()


def test_pool_is_kept_and_checked(photos, start, tmp_path):
    recipe = tiny.recipe(experts={"latent_pool": 3, "steps": 1})
    train(photos, tmp_path, start, recipe)
    before = (tmp_path / "latents.pt").read_bytes()
    train(photos, tmp_path, start, tiny.recipe(experts={"latent_pool": 3, "steps": 2}))
    assert (tmp_path / "latents.pt").read_bytes() == before
    with pytest.raises(InputError, match=r"not the 4 latents of this recipe; remove it"):
        train(photos, tmp_path, start, tiny.recipe(experts={"latent_pool": 4}))


def test_validation_draws_the_same_noise_each_time(photos, start, tmp_path):
    recipe = tiny.recipe(
        degradation="blind", experts={"learning_rate": 0.0, "val_every": 1, "val_samples": 2}
    )
    objective = objective_of(recipe, start, (0, 500))
    held_out = experts.with_lr(tiny.crops(photos, seed=9), recipe, "cpu")
    fit(objective, recipe.experts, tiny.crops(photos), tiny.run(tmp_path), "x", held_out)
    import json

    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    got = [v["val_loss"] for v in lines if "val_loss" in v]
    assert len(got) == 3 and len(set(got)) == 1


def test_noise_depends_on_the_sample_only(start, photos, tmp_path):
    """The loss of a sample does not depend on its batch, so N processes give the same results as one."""
    objective = objective_of(RECIPE, start)
    tiny.randomised(objective.network)
    objective.network.eval()
    hr = tiny.crops(photos).crops(0, 3)
    whole = objective.loss([torch.arange(3), hr], 0)[0]
    apart = [objective.loss([torch.tensor([i]), hr[i : i + 1]], 0)[0] for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(apart).mean())
    assert len({x.item() for x in apart}) == 3
    assert len(SampleRng(0, 2, range(3)).generators) == 3


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"expert": 2}, "--expert 2: the recipe has experts 0 to 1"),
        ({"model": {"unet": None}}, {}, r"model\.unet is null"),
        ({"model": {"decoder": {"channels": 16}}}, {}, "its autoencoder has other sizes"),
    ],
    ids=["number", "decoder-only", "autoencoder"],
)
def test_recipe_that_does_not_fit_the_checkpoint_is_refused(
    changes, options, message, photos, start, tmp_path
):
    with pytest.raises(UsageError, match=message):
        train(photos, tmp_path / "out", start, tiny.recipe(**changes), **options)
    assert not (tmp_path / "out").exists()


def test_initial_weights_of_another_network_are_refused(tmp_path):
    given = tiny.stage_1(tmp_path / "init", tiny.recipe(model={"unet": {"width": 16}}))
    assert RECIPE.model.unet is not None
    with pytest.raises(UsageError, match="its experts are of another network"):
        experts.initial_weights(RECIPE.model.unet, given, 0)


def test_without_space_moe_nothing_is_shared(start, tmp_path):
    recipe = tiny.recipe(model={"unet": {"space_experts": 0}})
    objective = objective_of(recipe, start)
    before = {k: v.clone() for k, v in objective.network.state_dict().items()}
    objective.after_step(0)
    assert tiny.same(objective.network.state_dict(), before)
    assert dataclasses.replace(recipe.experts).gamma_at(1) == 0.999
