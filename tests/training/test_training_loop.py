"""The training loop: exact resume, interruption, averaging, accumulation, validation, saved files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import types

import pytest
import tiny_training as tiny
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from moesr.runtime.errors import InputError, NonFiniteError, OutputError, UsageError
from moesr.training.loop.fit import fit
from moesr.training.loop.trainer import Trainer, learning_rate, read_state, write_state
from moesr.training.recipe import StageConfig

STAGE = StageConfig(steps=6, batch=2, accumulate=2, learning_rate=0.01, ema_decay=0.9, save_every=2)


class Numbers(Dataset[tuple[Tensor, ...]]):
    """A dataset whose sample `index` is its number and four values computed from it."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(index)
        return torch.tensor(index), torch.randn(4, generator=generator)


class Regression:
    """An objective that fits a linear layer to noisy targets, with noise from torch's global generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network, self.critic = nn.Linear(4, 1), None
        self.seen: list[list[int]] = []
        self.interrupt_at = self.bad_at = -1

    def loss(self, batch, step):
        self.seen.append(batch[0].tolist())
        if step == self.interrupt_at and self.seen[-1][0] == step * STAGE.accumulate * STAGE.batch:
            os.kill(os.getpid(), signal.SIGINT)
        error = self.network(batch[1])[:, 0] - batch[1].sum(dim=1) + torch.randn(len(batch[0]))
        loss = error.square().mean()
        return (loss * math.nan if step == self.bad_at else loss), {"error": error.abs().mean()}

    def after_step(self, step):
        pass

    def evaluate(self, batch):
        loss = (self.network(batch[1])[:, 0] - batch[1].sum(dim=1)).square().mean()
        return {"loss": loss}, torch.zeros(1, 3, 4, 8)


def train(directory, stage=STAGE, objective=None, **options):
    held_out = options.pop("held_out", None)
    return fit(objective or Regression(), stage, Numbers(), tiny.run(directory, **options), "test", held_out)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return train(directory).last, tiny.losses(directory)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path, uninterrupted):
    weights, losses = uninterrupted
    train(tmp_path, dataclasses.replace(STAGE, steps=3))
    resumed = train(tmp_path)
    assert tiny.losses(tmp_path) == losses
    assert tiny.same(resumed.last, weights)


def test_steps_after_the_last_saved_state_are_repeated(tmp_path, uninterrupted):
    weights, losses = uninterrupted
    objective = Regression()
    objective.bad_at = 5  # step 4 is done and logged, but only the state before it is saved
    with pytest.raises(NonFiniteError, match=r"step 5: the loss is not finite .* learning_rate"):
        train(tmp_path, objective=objective)
    assert read_state(tmp_path / "last.pt")["step"] == 4
    assert len(tiny.losses(tmp_path)) == 5
    assert tiny.same(train(tmp_path).last, weights)
    assert tiny.losses(tmp_path) == losses


class Overflow(torch.autograd.Function):
    """The identity function with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * math.inf


class Exploding(Regression):
    """A finite loss that has an infinite gradient at step 3, in the network or in its critic."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        if part == "discriminator":
            self.critic = nn.Linear(4, 1)

    def loss(self, batch, step):
        parts = {"network": super().loss(batch, step)[0]}
        if self.critic is not None:
            parts["discriminator"] = self.critic(batch[1]).square().mean()
        if step == 3:
            parts[self.part] = Overflow.apply(parts[self.part])
        return torch.stack(list(parts.values())).sum(), {}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0], ids=["free", "clipped"])
@pytest.mark.parametrize("part", ["network", "discriminator"])
def test_infinite_gradient_stops_training_before_the_weights_change(part, clip_norm, tmp_path):
    stage = dataclasses.replace(STAGE, clip_norm=clip_norm, save_every=1)
    objective = Exploding(part)
    with pytest.raises(NonFiniteError, match=rf"step 3: the gradient is not finite .*{part}.*clip_norm"):
        train(tmp_path, stage, objective)
    saved = read_state(tmp_path / "last.pt")
    assert saved["step"] == 3
    for weights in (*saved["modules"], saved["ema"], objective.network.state_dict()):
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_interrupt_saves_the_current_step(tmp_path, uninterrupted, caplog):
    weights, losses = uninterrupted
    objective = Regression()
    objective.interrupt_at = 2
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, dataclasses.replace(STAGE, save_every=100), objective)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 3; the same command continues it" in caplog.text
    assert read_state(tmp_path / "last.pt")["step"] == 3
    assert tiny.same(train(tmp_path).last, weights)
    assert tiny.losses(tmp_path) == losses


def test_failed_write_keeps_the_last_state(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_state(path, {"step": 1})

    def fail(state, file):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OutputError, match=r"last\.pt: cannot be written: No space left on device; free some"):
        write_state(path, {"step": 2})
    assert read_state(path) == {"step": 1}


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "foreign", "truncated"])
def test_damaged_state_is_refused(content, tmp_path):
    train(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes(path.read_bytes()[:-400] if content is None else content)
    message = r"last\.pt: the saved state is damaged \(.*\); delete it and run the same command again"
    with pytest.raises(InputError, match=message) as caught:
        train(tmp_path)
    assert "weights_only" not in str(caught.value)  # PyTorch's message advises an unsafe way to load the file


def test_state_with_missing_entries_is_refused(tmp_path):
    write_state(tmp_path / "last.pt", {"loss": 1.0})
    with pytest.raises(InputError, match="holds no training state; delete it"):
        read_state(tmp_path / "last.pt", "step")


def test_state_of_another_network_is_refused(tmp_path):
    train(tmp_path)
    other = Regression()
    other.network = nn.Linear(4, 2)
    with pytest.raises(InputError, match="not a state of this recipe"):
        train(tmp_path, objective=other)


def test_continuing_with_another_recipe_is_reported(tmp_path, caplog):
    train(tmp_path, dataclasses.replace(STAGE, steps=2))
    train(tmp_path, dataclasses.replace(STAGE, steps=3, save_every=7))
    assert not caplog.text
    train(tmp_path, dataclasses.replace(STAGE, steps=4, learning_rate=0.5))
    assert "continuing after step 3 with another recipe: learning_rate 0.01 -> 0.5" in caplog.text


def test_finished_run_is_not_continued(tmp_path, uninterrupted):
    train(tmp_path)
    objective = Regression()
    assert tiny.same(train(tmp_path, objective=objective).last, uninterrupted[0])
    assert not objective.seen


def test_samples_are_consecutive_for_any_number_of_loader_processes(tmp_path, uninterrupted):
    objective = Regression()
    assert tiny.same(train(tmp_path, objective=objective, workers=1).last, uninterrupted[0])
    numbers = [n for batch in objective.seen for n in batch]
    assert numbers == list(range(STAGE.steps * STAGE.accumulate * STAGE.batch))


def test_accumulation_equals_a_larger_batch(tmp_path):
    class Quiet(Regression):
        def loss(self, batch, step):
            loss = (self.network(batch[1])[:, 0] - batch[1].sum(dim=1)).square().mean()
            return loss, {}

    parts = train(tmp_path / "parts", objective=Quiet()).last
    whole = train(tmp_path / "whole", dataclasses.replace(STAGE, batch=4, accumulate=1), Quiet()).last
    for key in parts:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-5, atol=1e-6)


def test_seed_changes_the_random_numbers(tmp_path, uninterrupted):
    """torch's CPU generator uses only 32 bits of its seed, so seed and step are hashed into 32 bits."""
    train(tmp_path, seed=1)
    assert tiny.losses(tmp_path)[0] != uninterrupted[1][0]


def test_weight_average_follows_its_definition():
    objective = Regression()
    trainer = Trainer(objective, STAGE, tiny.CPU, 0)
    want = objective.network.weight.detach().clone()
    batches = iter(
        [
            list(map(torch.stack, zip(*[Numbers()[i] for i in range(k, k + 2)], strict=True)))
            for k in range(40)
        ]
    )
    for step in range(12):
        trainer.advance(batches)
        decay = min(0.9, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * objective.network.weight.detach()
    torch.testing.assert_close(trainer.ema["weight"], want)
    with trainer.averaged():
        assert torch.equal(objective.network.weight, trainer.ema["weight"]) and not objective.network.training
    assert not torch.equal(objective.network.weight, trainer.ema["weight"]) and objective.network.training


def test_learning_rate_warms_up_and_decays():
    stage = StageConfig(steps=100, learning_rate=2.0, warmup_steps=10, decay="cosine")
    assert learning_rate(stage, 0) == pytest.approx(0.2)
    assert learning_rate(stage, 50) == pytest.approx(1.0)
    assert learning_rate(stage, 99) < 0.001
    assert learning_rate(StageConfig(learning_rate=2.0), 99_999) == 2.0


def test_gradients_are_clipped(tmp_path):
    stage = dataclasses.replace(STAGE, steps=1, clip_norm=1e-3)
    objective = Regression()
    trainer = Trainer(objective, stage, tiny.CPU, 0)
    norms = []
    step = trainer.optimiser.step

    def watched():
        norms.append(torch.stack([p.grad.norm() for p in objective.network.parameters()]).norm())
        step()

    trainer.optimiser.step = watched
    trainer.advance(iter([[torch.arange(2), torch.ones(2, 4)]] * 2))
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-4)


def test_bf16_keeps_float32_weights(tmp_path):
    class Watched(Regression):
        def loss(self, batch, step):
            self.seen_type = self.network(batch[1]).dtype
            return super().loss(batch, step)

    objective = Watched()
    train(tmp_path, dataclasses.replace(STAGE, precision="bf16"), objective)
    assert objective.seen_type == torch.bfloat16 and objective.network.weight.dtype == torch.float32


def test_network_without_trainable_parameters_is_refused(tmp_path):
    objective = Regression()
    objective.network.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        train(tmp_path, objective=objective)


def test_best_weights_are_kept_beside_the_last(tmp_path):
    class Worsening(Regression):
        def evaluate(self, batch):
            self.count = getattr(self, "count", 0) + 1
            return {"loss": torch.tensor(float(self.count))}, torch.zeros(1, 3, 4, 8)

    stage = dataclasses.replace(STAGE, val_every=2, val_samples=1)
    objective = Worsening()
    fitted = train(tmp_path, stage, objective, held_out=Numbers())
    early = train(tmp_path / "early", dataclasses.replace(STAGE, steps=2))
    assert fitted.best is not None and tiny.same(fitted.best, early.last)
    assert not tiny.same(fitted.best, fitted.last)
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [(v["step"], v["val_loss"]) for v in lines if "val_loss" in v] == [(1, 1.0), (3, 2.0), (5, 3.0)]
    assert read_state(tmp_path / "best.pt")["step"] == 2


def test_validation_does_not_change_training(tmp_path, uninterrupted):
    stage = dataclasses.replace(STAGE, val_every=1, val_samples=3)
    assert tiny.same(train(tmp_path, stage, held_out=Numbers()).last, uninterrupted[0])


def test_tensorboard_gets_scalars_and_images(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, log_dir, purge_step):
            written.append(("open", log_dir, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def add_image(self, name, picture, step):
            written.append((name, step, picture.dtype, tuple(picture.shape)))

        def close(self):
            written.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    stage = dataclasses.replace(STAGE, steps=2, val_every=2, val_samples=2)
    train(tmp_path, stage, held_out=Numbers(), tensorboard=True)
    assert written[0] == ("open", str(tmp_path / "tensorboard"), 0)
    assert ("loss", 0) in written and ("error", 1) in written and ("val_loss", 1) in written
    assert ("validation", 1, torch.uint8, (3, 8, 8)) in written
    assert written[-1] == "closed"
