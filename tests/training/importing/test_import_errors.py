"""If a file is damaged, incomplete or holds no weights, the error names it and nothing is written."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from published_files import ldm_level, random_state, run

from moesr.training.checkpoint import load_checkpoint
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

SMALL_UNET = UNetConfig(width=32, channel_mult=(1, 2), res_blocks=1, attention_factors=(2,), space_experts=2)
SMALL_VQ = AutoencoderConfig(
    channels=32,
    channel_mult=(1, 2),
    res_blocks=1,
    codebook_size=16,
    fusion_level=None,
    refinement="none",
)


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return random_state(DenoisingUNet(SMALL_UNET)), random_state(Autoencoder(SMALL_VQ))


def cut(path: Path, legacy: bool = False, **state: torch.Tensor) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:-200])


def without(state: dict, *keys: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key not in keys}


EMA_KEY = "model_ema.diffusion_modelout2bias"
BAD_EXPERTS = {
    # Each entry: a function that writes the file, and text of the resulting message.
    "missing": (lambda p, unet, vq: None, "no such file"),
    "directory": (lambda p, unet, vq: p.mkdir(), "no such file"),
    "empty": (lambda p, unet, vq: p.touch(), "the file is empty"),
    "web-page": (lambda p, unet, vq: p.write_text("\n<!DOCTYPE html><html>"), "holds a web page"),
    "text": (lambda p, unet, vq: p.write_text("hello"), "not a whole PyTorch file"),
    "truncated": (lambda p, unet, vq: cut(p, **unet), "not a whole PyTorch file"),
    "truncated-legacy": (lambda p, unet, vq: cut(p, legacy=True, **unet), "not a whole PyTorch file"),
    "list": (lambda p, unet, vq: torch.save([torch.ones(1)], p), "holds list, expected a state dict"),
    "no-tensors": (lambda p, unet, vq: torch.save({"a": 1}, p), "entries a are not tensors"),
    "empty-dict": (lambda p, unet, vq: torch.save({}, p), "expected a state dict"),
    "autoencoder": (lambda p, unet, vq: torch.save(vq, p), "missing input_blocks.0.0.weight"),
    "missing-key": (lambda p, unet, vq: torch.save(without(unet, "out.2.bias"), p), "missing out.2.bias;"),
    "missing-size": (
        lambda p, unet, vq: torch.save(without(unet, "input_blocks.1.0.in_layers.2.weight"), p),
        "missing input_blocks.1.0.in_layers.2.weight;",
    ),
    "unknown-key": (lambda p, unet, vq: torch.save(unet | {"extra": torch.ones(1)}, p), "unknown extra;"),
    "unknown-beside-prefix": (
        lambda p, unet, vq: torch.save(ldm_level(unet) | {"cond_model.w": torch.ones(1)}, p),
        "unknown cond_model.w;",
    ),
    "misshapen-key": (
        lambda p, unet, vq: torch.save(unet | {"out.2.bias": torch.ones(5)}, p),
        "misshapen out.2.bias (5,) (expected (3,));",
    ),
    "missing-space-expert": (
        lambda p, unet, vq: torch.save(without(unet, "middle_block.2.moe_blocks.0.3.bias"), p),
        "missing middle_block.2.moe_blocks.0.3.bias;",
    ),
    "incomplete-ema": (
        lambda p, unet, vq: torch.save(without(ldm_level(unet, unet), EMA_KEY), p),
        "EMA copies under model_ema.: missing diffusion_modelout2bias;",
    ),
    "unknown-ema": (
        lambda p, unet, vq: torch.save(ldm_level(unet, unet) | {"model_ema.extra": torch.ones(1)}, p),
        "unknown extra;",
    ),
    "only-ema": (
        lambda p, unet, vq: torch.save({k: v for k, v in ldm_level({}, unet).items() if "ema" in k}, p),
        "missing input_blocks.0.0.weight;",
    ),
    "other-latent": (
        lambda p, unet, vq: torch.save(
            unet | {"out.2.weight": torch.ones(4, 32, 3, 3), "out.2.bias": torch.ones(4)}, p
        ),
        "predicts latents of 4 channels",
    ),
    "no-scale": (
        lambda p, unet, vq: torch.save(ldm_level(unet) | {"scale_factor": torch.zeros(())}, p),
        "scale_factor is not a positive number",
    ),
    "not-finite": (
        lambda p, unet, vq: torch.save(unet | {"out.2.bias": torch.full((3,), torch.nan)}, p),
        "out.2.bias is not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_EXPERTS)
def test_message_names_a_bad_expert_file(case, small, tmp_path, capsys):
    write, message = BAD_EXPERTS[case]
    path, decoder = tmp_path / "expert.ckpt", tmp_path / "decoder.pth"
    write(path, *small)
    torch.save(small[1], decoder)
    before = sorted(tmp_path.iterdir())
    assert run("--experts", path, "--decoder", decoder, "-o", tmp_path / "model") == 1
    assert sorted(tmp_path.iterdir()) == before
    err = capsys.readouterr().err
    assert message in err
    assert str(path) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("keys", "message"),
    [(0, "missing encoder.conv_in.weight;"), (1, "missing quant_conv.weight;")],
    ids=["unet", "missing-key"],
)
def test_message_names_a_bad_decoder_file(keys, message, small, tmp_path, capsys):
    path = tmp_path / "decoder.pth"
    torch.save(small[0] if keys == 0 else without(small[1], "quant_conv.weight"), path)
    assert run("--decoder", path, "-o", tmp_path / "model") == 1
    err = capsys.readouterr().err
    assert f"{path}: {message}" in err
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_if_a_later_expert_has_another_width(small, tmp_path, capsys):
    unet, vq = small
    wide = random_state(DenoisingUNet(dataclasses.replace(SMALL_UNET, width=64)))
    files = {"s0.ckpt": unet, "s1.ckpt": wide, "vae.pth": vq}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
    experts = (tmp_path / "s0.ckpt", tmp_path / "s1.ckpt")
    assert run("--experts", *experts, "--decoder", tmp_path / "vae.pth", "-o", tmp_path / "model") == 1
    assert f"{tmp_path / 's1.ckpt'}: " in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == set(files)


class RunsCode:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch):
    """A callback as training frameworks save it; its module does not exist when the file is read."""
    module = types.ModuleType("framework")

    class Callback(dict):
        pass

    Callback.__module__, Callback.__qualname__ = "framework", "Callback"
    module.Callback = Callback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "framework", module)
    made = Callback(best=1.0)
    made.monitor = "loss"
    return made


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_objects_are_ignored_and_never_executed(zipped, small, tmp_path, callback, monkeypatch):
    path, marker, out = tmp_path / "vae.ckpt", tmp_path / "ran", tmp_path / "model"
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in small[1].items()}
    content = {"state_dict": parameters, "hyper_parameters": RunsCode(marker)}
    content |= {
        "callbacks": {callback.__class__: callback},
        "loops": [callback],
        "optimizer_states": [{1, 2}],
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "framework")
    assert run("--decoder", path, "-o", out) == 0
    assert not marker.exists()
    imported = load_checkpoint(out).decoder().state_dict()
    torch.testing.assert_close(imported["encoder.conv_in.weight"], small[1]["encoder.conv_in.weight"])


def test_state_dict_with_entries_that_are_not_tensors_is_refused(small, tmp_path, capsys):
    torch.save({"state_dict": {**small[1], "hook": RunsCode(tmp_path / "ran")}}, tmp_path / "vae.pth")
    assert run("--decoder", tmp_path / "vae.pth", "-o", tmp_path / "model") == 1
    assert "entries hook are not tensors" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_quiet_prints_nothing(small, tmp_path, capsys):
    torch.save(small[1], tmp_path / "vae.pth")
    assert run("--decoder", tmp_path / "vae.pth", "-o", tmp_path / "model", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_existing_output_needs_force(small, tmp_path, capsys):
    torch.save(small[1], tmp_path / "vae.pth")
    args = ("--decoder", tmp_path / "vae.pth", "-o", tmp_path / "model")
    assert run(*args) == 0
    digest = load_checkpoint(tmp_path / "model").sha256()
    assert run(*args, "--name", "second") == 1
    assert "--force" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "model").sha256() == digest
    assert run(*args, "--name", "second", "--force") == 0
    assert load_checkpoint(tmp_path / "model").config.name == "second"


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--head-channels", 24), "--head-channels"), (("--norm-groups", 24), "divisible")],
    ids=["head-channels", "norm-groups"],
)
def test_sizes_given_as_options_must_fit_the_weights(options, message, small, tmp_path, capsys):
    for name, state in zip(("unet.ckpt", "vae.pth"), small, strict=True):
        torch.save(state, tmp_path / name)
    args = ("--experts", tmp_path / "unet.ckpt", "--decoder", tmp_path / "vae.pth", "-o", tmp_path / "model")
    assert run(*args, *options) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("odd"), 1, "internal error, please report it: RuntimeError: odd"),
        (MemoryError(), 4, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
    ids=["internal", "memory", "ctrl-c"],
)
def test_every_exception_is_reported_in_one_line(error, code, message, small, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise error

    torch.save(small[1], tmp_path / "vae.pth")
    monkeypatch.setattr("moesr.training.importing.moe_sr.save_checkpoint", fail)
    assert run("--decoder", tmp_path / "vae.pth", "-o", tmp_path / "model", "--quiet") == code
    err = capsys.readouterr().err
    assert err.startswith("moesr-import: error: ") and message in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "args", [(), ("--decoder", "x", "-o", "y", "--scale", "3")], ids=["nothing", "scale-3"]
)
def test_wrong_arguments_are_usage_errors(args):
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    assert re.search(r"--head-channels.*\(default: 32\)", capsys.readouterr().out, re.DOTALL)
