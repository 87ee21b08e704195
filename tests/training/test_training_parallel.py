"""Two processes give the same losses and weights, up to rounding, as one process with twice the batch.

Run as a program, this file is one of the two processes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training as tiny
import torch
from torch import nn

from moesr.training.checkpoint import load_checkpoint
from moesr.training.loop import distributed
from moesr.training.loop.trainer import read_state
from moesr.training.stages import autoencoder, decoder, experts

BATCH = 2  # per process


def changes(batch: int) -> dict[str, dict[str, object]]:
    """Return changes of the recipe with which training uses every collective operation."""
    common = {"batch": batch, "accumulate": 2, "steps": 3, "val_every": 2, "val_samples": 3}
    return {
        "autoencoder": {**common, "quantise_from": 2},
        "experts": {**common, "clip_norm": 0.5},
        "decoder": {**common, "adversarial_weight": 0.8, "adversarial_from": 1, "clip_norm": 1.0},
    }


def train(folder: Path, batch: int, device: torch.device, name: str) -> None:
    """Train the three stages on the photographs and checkpoints in `folder`."""
    recipe = tiny.recipe(degradation="blind", **changes(batch))
    data = tiny.crops(folder / "photos")
    start = load_checkpoint(folder / "experts")

    def run(stage: str):
        return tiny.run(folder / name / stage, device=device)

    autoencoder.train(recipe, data, run("autoencoder"), data)
    experts.train(recipe, data, run("experts"), start, data, expert=0)
    decoder.train(recipe, data, run("decoder"), start, data)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with the results of one process (`one`) and of two (`two`)."""
    folder = tmp_path_factory.mktemp("parallel")
    tiny.photographs(folder / "photos")
    tiny.stage_1(folder / "experts", tiny.recipe())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join(sys.path)
    common = {
        **os.environ,
        "PYTHONPATH": path,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    train(folder, 2 * BATCH, tiny.CPU, "one")
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    return folder


RUNS = ("autoencoder", "experts/expert_0", "decoder")


@pytest.mark.parametrize("stage", RUNS)
def test_losses_agree(both, stage):
    one, two = (tiny.losses(both / name / stage) for name in ("one", "two"))
    assert len(one) == 3 and len(set(one)) == 3
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("stage", RUNS)
def test_validation_agrees(both, stage):
    one, two = (read_state(both / name / stage / "best.pt") for name in ("one", "two"))
    assert two["step"] == one["step"] and two["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.parametrize("stage", RUNS)
def test_weights_agree(both, stage):
    """Errors are relative to the change by training, also for BatchNorm and the discriminator."""
    one, two = (read_state(both / name / stage / "last.pt")["modules"] for name in ("one", "two"))
    assert len(one) == len(two) == (2 if stage == "decoder" else 1)
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        difference = torch.cat([(mine[k].double() - other[k].double()).flatten() for k in mine])
        learning_rate, steps = 1e-3, 3
        assert float(difference.abs().mean()) < 0.02 * learning_rate * steps


def test_latents_agree(both):
    one, two = (decoder.latents.Triples(both / name / "decoder" / "latents", 0) for name in ("one", "two"))
    for index in range(5):
        for mine, other in zip(one[index], two[index], strict=True):
            torch.testing.assert_close(mine, other)


def test_collective_operations_of_one_process_are_the_identity():
    values = torch.randn(3, 4)
    assert (distributed.rank(), distributed.size()) == (0, 1)
    for function in (distributed.mean, distributed.total, distributed.gather):
        assert torch.equal(function(values), values)
    network = nn.Sequential(nn.BatchNorm2d(4))
    distributed.synchronise_batch_norms(network)
    assert type(network[0]) is nn.BatchNorm2d


@pytest.fixture
def alone(monkeypatch):
    """Make the synchronized layers work in one process without a process group."""
    monkeypatch.setattr(distributed, "differentiable_all_reduce", lambda x: x)


def test_synchronised_batch_norm_equals_batch_norm(alone):
    torch.manual_seed(0)
    plain, synced = nn.BatchNorm2d(3), distributed.SyncedBatchNorm2d(3)
    x = torch.randn(4, 3, 5, 2) * 3 + 50  # a mean far from 0 would show cancellation
    for _ in range(2):
        torch.testing.assert_close(synced(x), plain(x), rtol=1e-4, atol=1e-4)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[key], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(synced.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


def test_gradient_of_synchronised_batch_norm(alone, monkeypatch):
    layer = distributed.SyncedBatchNorm2d(2).double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.processes("cpu") as own:
        train(Path(sys.argv[1]), BATCH, own, "two")
