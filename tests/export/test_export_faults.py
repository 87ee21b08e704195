"""The export refuses bad inputs, and a failure leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from graphs import random_network, write_checkpoint

from moesr.export import cli, parity
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.training.checkpoint import save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig
from moesr.training.networks import Autoencoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("engine") / "tiny"
    assert cli.main([str(checkpoint), "-o", str(directory), "--tile", "32"]) == 0
    return directory


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def fail_parity(monkeypatch):
    monkeypatch.setitem(parity.THRESHOLDS, ("fp32", "fp32"), 0.0)


def raising(error: BaseException):
    def spoil(monkeypatch):
        def stop(*arguments, **named):
            raise error

        monkeypatch.setattr(parity, "prove", stop)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (fail_parity, 3, "nothing was published; please report this"),
        (raising(KeyboardInterrupt()), 130, "nothing was written"),
        (raising(MemoryError()), 4, "smaller --tile"),
        (
            raising(OSError(28, "No space left on device")),
            1,
            "cannot write the engine: No space left on device",
        ),
        (raising(RuntimeError("a fault")), 1, "internal error, please report it: RuntimeError: a fault"),
    ],
    ids=["parity", "ctrl-c", "memory", "full", "fault"],
)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_failure_does_not_change_the_output_directory(
    spoil, code, says, existing, checkpoint, engine, tmp_path, monkeypatch, capsys
):
    target = tmp_path / "engine"
    if existing:
        shutil.copytree(engine, target)
    before = snapshot(tmp_path)
    spoil(monkeypatch)
    assert cli.main([str(checkpoint), "-o", str(target), "--tile", "32", "--force"]) == code
    assert snapshot(tmp_path) == before and (existing or not any(tmp_path.iterdir()))
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_debug_prints_a_traceback(checkpoint, tmp_path, monkeypatch, capsys):
    raising(RuntimeError("a fault"))(monkeypatch)
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "e"), "--tile", "32", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_onnx():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxruntime')));"
        "from moesr.export.cli import main; main(['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "--store" in result.stdout, result.stderr


def test_only_one_precision_is_accepted(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--bf16", "--int8"])
    assert "not allowed with" in capsys.readouterr().err


def test_existing_engine_needs_force(checkpoint, engine, tmp_path, capsys):
    target = tmp_path / "engine"
    shutil.copytree(engine, target)
    before, arguments = snapshot(target), [str(checkpoint), "-o", str(target), "--tile", "64"]
    assert cli.main(arguments) == 1
    assert "--force" in capsys.readouterr().err and snapshot(target) == before
    assert cli.main([*arguments, "--force"]) == 0
    assert read_manifest(target).tile == 64 and [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_force_does_not_replace_other_directories(checkpoint, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "photos"), "--tile", "32", "--force"]) == 1
    assert "no manifest.json" in capsys.readouterr().err
    assert snapshot(tmp_path) == {"photos/cat.png": b"cat"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 1, "not a directory"),
        (["CHECKPOINT", "--tile", "100"], 2, "try 96 or 128"),
        (["CHECKPOINT", "--tile", "8"], 2, "try 32"),
        (["CHECKPOINT", "--tile", "-64"], 2, "try 32"),
    ],
)
def test_bad_input_is_refused(arguments, code, says, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]) == code
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and not any(tmp_path.iterdir())


def test_decoder_alone_is_refused(tmp_path, capsys):
    config = ModelConfig(name="kl", unet=None, decoder=AutoencoderConfig(channels=32, codebook_size=64))
    state = random_network(Autoencoder(config.decoder), 0).state_dict()
    save_checkpoint(tmp_path / "kl", config, [], state)
    assert cli.main([str(tmp_path / "kl"), "-o", str(tmp_path / "engine")]) == 2
    assert "decoder on its own" in capsys.readouterr().err
