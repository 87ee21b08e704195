"""moesr-train: all stages on two tiny photographs, refused arguments, interruption, and the dry run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny_training as tiny
import torch

from moesr.training.checkpoint import load_checkpoint
from moesr.training.cli import main, parser
from moesr.training.loop.out_of_memory import lighter, memory_relief
from moesr.training.loop.trainer import read_state
from moesr.training.recipe import load_recipe


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder in which all stages were run: photographs, recipe and one directory per stage."""
    folder = tmp_path_factory.mktemp("chain")
    photos = tiny.photographs(folder / "photos")
    (photos / "broken.png").write_bytes((photos / "photo_0.png").read_bytes()[:20])
    tiny.write_recipe(folder / "tiny.json", degradation="blind")
    assert main(arguments(folder, "autoencoder")) == 0
    assert main(arguments(folder, "experts", "--from", folder / "autoencoder/checkpoint")) == 0
    after = "--from", folder / "experts/checkpoint"
    assert main(arguments(folder, "latents", *after)) == 0
    made = ["--latents", folder / "latents", "--val", photos]
    assert (
        main(arguments(folder, "decoder", *after, *made, "--set", "decoder.val_samples=1", data=False)) == 0
    )
    return folder


def arguments(folder, stage, *options, data=True):
    common = ["--config", folder / "tiny.json", "-o", folder / stage, "--device", "cpu", "--quiet"]
    return [str(a) for a in (stage, *common, *(["--data", folder / "photos"] if data else []), *options)]


def test_stages_end_in_a_complete_model(chain):
    first, experts, whole = (
        load_checkpoint(chain / s / "checkpoint") for s in ("autoencoder", "experts", "decoder")
    )
    recipe = tiny.recipe()
    assert first.config.unet is None
    assert whole.config.decoder == recipe.model.decoder and whole.config.unet == experts.config.unet
    assert tiny.same(experts.decoder().state_dict(), first.decoder().state_dict())
    plain, decoder = first.decoder().state_dict(), whole.decoder().state_dict()
    # only fusion and refinement are trained
    assert all(torch.equal(decoder[key], plain[key]) for key in plain)
    z, lr = torch.randn(1, 3, 8, 8), torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert whole.decoder().decode(z, lr).isfinite().all()
        assert whole.expert(1)(z, z, torch.tensor([700])).abs().sum() > 0
    for stage in ("autoencoder", "experts/expert_0", "experts/expert_1", "decoder"):
        assert len(tiny.losses(chain / stage)) == 3
    assert (chain / "decoder" / "checkpoint-best").is_dir()


def test_running_the_stages_again_changes_nothing(chain, capsys):
    before = load_checkpoint(chain / "experts/checkpoint").sha256()
    assert main(arguments(chain, "experts", "--from", chain / "autoencoder/checkpoint")) == 0
    assert load_checkpoint(chain / "experts/checkpoint").sha256() == before
    assert "broken.png: skipped, cannot be read" in capsys.readouterr().err


def test_all_stages_in_one_command(chain, tmp_path, capsys):
    """`all`, also with --from, makes the latents itself and gives the weights of single stages."""
    whole = arguments(chain, "all", "-o", tmp_path / "whole")
    assert main(whole) == 0
    # the folder is scanned once for all stages
    assert capsys.readouterr().err.count("broken.png: skipped") == 1
    got = load_checkpoint(tmp_path / "whole/decoder/checkpoint")
    first = load_checkpoint(chain / "autoencoder/checkpoint")
    assert tiny.same(
        load_checkpoint(tmp_path / "whole/autoencoder/checkpoint").decoder().state_dict(),
        first.decoder().state_dict(),
    )
    assert tiny.same(
        got.decoder().state_dict(), load_checkpoint(chain / "decoder/checkpoint").decoder().state_dict()
    )
    later = arguments(chain, "all", "-o", tmp_path / "later", "--from", chain / "autoencoder/checkpoint")
    assert main(later) == 0
    assert load_checkpoint(tmp_path / "later/decoder/checkpoint").sha256() == got.sha256()
    assert not (tmp_path / "later/autoencoder").exists()


def test_model_can_be_exported(chain, tmp_path):
    pytest.importorskip("onnxruntime")
    from moesr.export.cli import main as export

    assert export([str(chain / "decoder/checkpoint"), "-o", str(tmp_path / "engine"), "--tile", "64"]) in (
        0,
        None,
    )
    assert (tmp_path / "engine" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("stage", "options", "code", "message"),
    [
        ("experts", [], 2, "experts builds on another stage: give --from with the checkpoint of autoencoder"),
        ("decoder", [], 2, "give --from with the checkpoint of experts"),
        ("autoencoder", ["--config", "nope"], 2, "nope: no such recipe file; presets are"),
        ("autoencoder", ["--set", "autoencoder.stepz=3"], 2, "unknown entries autoencoder.stepz"),
        (
            "autoencoder",
            ["--data", "nowhere"],
            1,
            "nowhere: not a directory; expected a folder of photographs",
        ),
        (
            "autoencoder",
            ["--set", "autoencoder.patch_px=64"],
            1,
            "no readable image with sides of at least 64 px",
        ),
        ("autoencoder", ["--expert", "0"], 2, "--expert: is for experts only, not for autoencoder"),
        ("experts", ["--from", "nowhere"], 1, "nowhere: not a directory; expected a checkpoint directory"),
        ("autoencoder", ["--device", "tpu"], 2, "--device tpu: cannot be used"),
        ("autoencoder", ["--workers", "-1"], 2, "expected 0 or more"),
        ("autoencoder", ["--tensorboard"], 2, "pip install 'moesr[train]', or omit it"),
        ("latents", ["--dry-run", "--from", "x"], 2, "not those of latents; name a stage that trains"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_are_reported_in_one_line(
    stage, options, code, message, chain, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    assert main([*arguments(chain, stage), *options, "-o", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moesr-train: error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "error", "fixed"),
    [
        ("autoencoder", torch.OutOfMemoryError("CUDA out of memory."), {"batch": 1, "accumulate": 2}),
        ("all", RuntimeError("DefaultCPUAllocator: can't allocate memory"), {"batch": 1, "accumulate": 2}),
        ("latents", torch.OutOfMemoryError("CUDA out of memory."), {"latent_batch": 8}),
    ],
    ids=["stage", "all-cpu", "latents"],
)
def test_options_advised_when_memory_runs_out_are_valid(
    stage, error, fixed, chain, tmp_path, capsys, monkeypatch
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("moesr.training.loop.trainer.Trainer.advance", fail)
    monkeypatch.setattr("moesr.training.stages.latents.sample", fail)
    start = ["--from", str(chain / "experts/checkpoint")] if stage == "latents" else []
    command = [*arguments(chain, stage, *start), "-o", str(tmp_path)]
    assert main(command) == 4
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(error) in message
    advised = re.search(r"run again with (--set .*)", message)
    assert advised
    changes = parser().parse_args([*command, *advised[1].split()]).changes
    changed = load_recipe(str(chain / "tiny.json"), changes)
    part = changed.decoder if stage == "latents" else changed.autoencoder
    assert {key: getattr(part, key) for key in fixed} == fixed


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"batch": 9, "accumulate": 2}, ["experts.batch=3", "experts.accumulate=6"]),
        ({"batch": 1}, ["experts.precision=bf16"]),
        ({"batch": 1, "precision": "bf16"}, []),
    ],
    ids=["nine", "one", "least"],
)
def test_advised_options_keep_the_number_of_samples_per_step(changes, want):
    assert lighter("experts", tiny.recipe(experts=changes)) == want


def test_other_errors_are_not_reported_as_out_of_memory():
    with pytest.raises(RuntimeError, match="shape"), memory_relief("experts", tiny.recipe()):
        raise RuntimeError("shape mismatch")


def test_missing_data_option_is_reported(chain, capsys):
    assert main(arguments(chain, "autoencoder", data=False)) == 2
    assert "autoencoder needs photographs: give --data" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["autoencoder", "experts", "decoder"])
def test_dry_run_measures_and_writes_nothing(stage, chain, tmp_path, capsys):
    before = "autoencoder" if stage == "experts" else "experts"
    start = [] if stage == "autoencoder" else ["--from", chain / before / "checkpoint"]
    files = sorted(chain.rglob("*"))
    out = tmp_path / "out"
    assert main(arguments(chain, stage, *start, "--dry-run", "-o", out)) == 0
    assert not out.exists() and sorted(chain.rglob("*")) == files
    lines = capsys.readouterr().out.splitlines()
    assert "M parameters" in lines[0] and "M trained" in lines[0]
    samples = {"autoencoder": 2, "experts": 4, "decoder": 2}[stage]
    assert lines[1].startswith(f"{samples} samples per step, ") and lines[1].endswith("steps per second")
    assert "MiB of memory at the peak" in lines[2] and "3 steps take about" in lines[3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_interrupted_training_can_be_continued(number, code, chain, tmp_path):
    out = tmp_path / "out"
    long = ["--set", "autoencoder.steps=100000", "--set", "autoencoder.save_every=100000", "-o", str(out)]
    command = [sys.executable, "-m", "moesr.training.cli", *arguments(chain, "autoencoder"), *long]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (out / "losses.jsonl").exists() or (out / "losses.jsonl").stat().st_size < 200:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors and "the same command continues it" in errors
    steps = len(tiny.losses(out))
    assert steps > 0 and read_state(out / "last.pt")["step"] == steps
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("program", ["cli", "importing.cli"])
def test_building_the_parser_does_not_import_torch(program):
    code = f"import sys, moesr.training.{program} as m; m.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="tests the allocator of glibc")
def test_allocator_keeps_freed_memory():
    """Allocating a large block for the second time causes hardly any page faults."""
    code = """
import ctypes, resource, sys
import numpy as np
from moesr.training.loop.allocator import keep_freed
if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit("no mallopt")
keep_freed()
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(2):
    np.ones(2**23)  # 64 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
first, second = np.diff(faults)
print(first, second)
sys.exit(0 if second < first / 10 else 1)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "no mallopt" in result.stderr:
        pytest.skip("the C library has no mallopt")
    assert result.returncode == 0, result.stdout + result.stderr
