"""Checkpoint directories round-trip, space experts are merged exactly, and damage is reported clearly."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import typing
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_l2
from safetensors.torch import load_file, save_file

from moesr.runtime.errors import OutputError
from moesr.training.checkpoint import CheckpointError, load_checkpoint, merge_space_experts, save_checkpoint
from moesr.training.config import (
    AutoencoderConfig,
    ModelConfig,
    StableDiffusionConfig,
    StableSRConfig,
    UNetConfig,
)
from moesr.training.networks import Autoencoder, DenoisingUNet

UNET = UNetConfig(width=32, channel_mult=(1, 2), res_blocks=1, attention_factors=(2,), space_experts=3)
VQ = AutoencoderConfig(
    channels=32, channel_mult=(1, 2), res_blocks=1, codebook_size=16, fusion_growth=4, fusion_blocks=1
)
PLAIN = dataclasses.replace(VQ, fusion_level=None, refinement="none")
KL = dataclasses.replace(PLAIN, codebook_size=0, z_channels=4, embed_dim=4, refinement="unet")
SAVED_DEMO = Path(str(resources.files("moesr.training"))) / "demo_checkpoints" / "demo-x4"
TWO = ((0, 500), (500, 1000))
ONE = ((0, 1000),)
FAMILIES = {
    "moe": ModelConfig(unet=UNET, decoder=VQ, expert_ranges=TWO),
    "ldm": ModelConfig(unet=dataclasses.replace(UNET, space_experts=0), decoder=PLAIN, expert_ranges=ONE),
    "decoder-only": ModelConfig(unet=None, decoder=KL, expert_ranges=()),
}


@functools.cache
def make_networks(config: ModelConfig) -> tuple[list[DenoisingUNet], Autoencoder]:
    torch.manual_seed(0)
    experts = [DenoisingUNet(config.unet).eval() for _ in config.expert_ranges] if config.unet else []
    for expert in experts:
        # a layer that starts at zero would hide errors of the layers before it
        torch.nn.init.normal_(expert.get_parameter("out.2.weight"))
    return experts, Autoencoder(config.decoder).eval()


def save(directory: Path, config: ModelConfig, **options):
    experts, decoder = make_networks(config)
    return save_checkpoint(
        directory, config, [e.state_dict() for e in experts], decoder.state_dict(), **options
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_round_trip(family, tmp_path):
    config = FAMILIES[family]
    experts, decoder = make_networks(config)
    save(tmp_path / "model", config)
    loaded = load_checkpoint(tmp_path / "model")
    if config.unet:
        merged = dataclasses.replace(config.unet, space_experts=min(config.unet.space_experts, 1))
        assert loaded.config == dataclasses.replace(config, unet=merged)
    else:
        assert loaded.config == config
    z, cond, t = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([7])
    for k, expert in enumerate(experts):
        assert not loaded.expert(k).training
        assert relative_l2(loaded.expert(k)(z, cond, t).numpy(), expert(z, cond, t).numpy()) < 1e-5
    latent, lr = torch.randn(1, config.decoder.embed_dim, 8, 8), torch.randn(1, 3, 16, 16)
    assert not loaded.decoder().training
    image, want = loaded.decoder().decode(latent, lr), decoder.decode(latent, lr)
    assert relative_l2(image.numpy(), want.numpy()) < 1e-5
    names = [f"expert_{k}.safetensors" for k in range(len(experts))]
    assert sorted(p.name for p in tmp_path.glob("model/*")) == ["config.json", "decoder.safetensors", *names]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_half_precision_storage_loads_as_float32(tmp_path):
    full = save(tmp_path / "full", FAMILIES["ldm"])
    half = save(tmp_path / "half", FAMILIES["ldm"], dtype=torch.float16)
    assert (half.files[1].stat().st_size) < 0.6 * full.files[1].stat().st_size
    for network, original in ((half.expert(0), full.expert(0)), (half.decoder(), full.decoder())):
        values = original.state_dict()
        for key, tensor in network.state_dict().items():
            assert tensor.dtype == values[key].dtype
            assert torch.equal(tensor, values[key].half().to(tensor.dtype))


@pytest.mark.parametrize("count", [1, 2, 3, 16, 20])
def test_merge_is_the_float64_mean(count):
    rng = np.random.default_rng(count)
    # with a large offset, a mean accumulated in float32 is wrong in the last digits
    ffns = [(1000 + rng.standard_normal((4, 2))).astype(np.float32) for _ in range(count)]
    names = [f"input_blocks.10.2.moe_blocks.{i}.0.weight" for i in range(count)]
    state = {"moe_norm.weight": torch.ones(2)} | dict(zip(names, map(torch.from_numpy, ffns), strict=True))
    merged = merge_space_experts(state)
    assert list(merged) == ["moe_norm.weight", names[0]]
    want = np.mean(np.stack(ffns).astype(np.float64), axis=0).astype(np.float32)
    np.testing.assert_array_equal(merged[names[0]].numpy(), want)


def test_merge_refuses_an_incomplete_expert():
    state = {f"m.moe_blocks.{i}.{part}": torch.ones(2) for i in range(3) for part in ("0.bias", "3.bias")}
    del state["m.moe_blocks.1.3.bias"]
    with pytest.raises(CheckpointError, match=r"m\.moe_blocks\.0\.3\.bias: space experts \[0, 2\]"):
        merge_space_experts(state)


def test_sha256_covers_the_files_of_the_checkpoint_only(tmp_path):
    first, again = (save(tmp_path / name, FAMILIES["moe"]) for name in ("first", "again"))
    digest = first.sha256()
    assert digest == again.sha256()
    (first.directory / "notes.txt").write_text("not part of it")
    assert first.sha256() == digest
    for path in again.files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert again.sha256() != digest, path.name
        path.write_bytes(content)
    assert again.sha256() == digest


@pytest.mark.parametrize("k", [-1, 2])
def test_expert_number_out_of_range_is_refused(k, tmp_path):
    with pytest.raises(CheckpointError, match=f"no expert {k}.*holds 2 experts"):
        save(tmp_path / "model", FAMILIES["moe"]).expert(k)


def edit_config(**changes):
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def edit_weights(name: str, change):
    def damage(directory: Path) -> None:
        path = directory / name
        state = load_file(path)
        change(state)
        save_file(state, path)

    return damage


def truncate(directory: Path) -> None:
    path = directory / "expert_1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


KEY = "input_blocks.0.0.weight"
DAMAGE = {
    "no-config": (lambda d: (d / "config.json").unlink(), r"config\.json: no such file"),
    "no-json": (lambda d: (d / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
    "no-text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe"),
        r"config\.json: cannot be read as JSON",
    ),
    "no-object": (lambda d: (d / "config.json").write_text("[]"), r"config\.json: schema is None"),
    "nested-deeply": (
        lambda d: (d / "config.json").write_text('{"a":' * 200_000),
        r"config\.json: cannot be read as JSON \(nested too deeply\)",
    ),
    "other-schema": (edit_config(schema=2), r"config\.json: schema is 2, this version reads 1"),
    "unknown-entry": (edit_config(color="blue"), r"config\.json: unknown entries color, expected"),
    "wrong-type": (edit_config(scale="4"), r"config\.json: scale is '4', expected int"),
    "bad-schedule": (edit_config(schedule={"timesteps": 0}), r"config\.json: .*timestep"),
    "bad-ranges": (edit_config(expert_ranges=[[0, 500], [400, 1000]]), r"config\.json: expert ranges"),
    "bad-sizes": (edit_config(decoder={"channels": 33}), r"config\.json: these sizes make no network"),
    "unmerged": (edit_config(unet={"space_experts": 16}), r"space_experts is 16, expected 1 \(merged\) or 0"),
    "no-expert": (lambda d: (d / "expert_1.safetensors").unlink(), r"expert_1\.safetensors: no such file"),
    "no-decoder": (lambda d: (d / "decoder.safetensors").unlink(), r"decoder\.safetensors: no such file"),
    "truncated": (truncate, r"expert_1\.safetensors: not a whole safetensors file"),
    "garbage": (
        lambda d: (d / "decoder.safetensors").write_bytes(b"junk"),
        r"decoder\.safetensors: not a whole",
    ),
    "missing-key": (
        edit_weights("expert_0.safetensors", lambda s: s.pop(KEY)),
        rf"expert_0.*: missing {KEY};",
    ),
    "unknown-key": (
        edit_weights("decoder.safetensors", lambda s: s.update(extra=torch.ones(1))),
        r"decoder\.safetensors: unknown extra;",
    ),
    "misshapen-key": (
        edit_weights("expert_1.safetensors", lambda s: s.update({KEY: torch.ones(2)})),
        rf"expert_1.*: misshapen {KEY} \(2,\) \(expected \(32, 6, 3, 3\)\);",
    ),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("intact") / "model", FAMILIES["moe"]).directory


@pytest.mark.parametrize("damage", DAMAGE)
def test_message_names_the_damage(damage, intact, tmp_path):
    change, message = DAMAGE[damage]
    directory = shutil.copytree(intact, tmp_path / "model")
    change(directory)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "key"),
    [("decoder.safetensors", "encoder.conv_out.bias"), ("expert_1.safetensors", KEY)],
    ids=["unused-by-the-graphs", "used"],
)
def test_message_names_weights_that_are_not_finite(name, key, value, intact, tmp_path):
    directory = shutil.copytree(intact, tmp_path / "model")
    edit_weights(name, lambda state: state[key].view(-1)[-1:].fill_(value))(directory)
    checkpoint = load_checkpoint(directory)
    with pytest.raises(CheckpointError, match=rf"{name}: {key} is not finite; train or import"):
        checkpoint.decoder() if "decoder" in name else checkpoint.expert(1)


@pytest.mark.parametrize("name", ["absent", "file"])
def test_path_that_is_no_directory_is_refused(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{name}: not a directory"):
        load_checkpoint(tmp_path / name)


def test_long_lists_of_missing_keys_are_shortened(intact, tmp_path):
    directory = shutil.copytree(intact, tmp_path / "model")
    edit_weights("expert_0.safetensors", dict.clear)(directory)
    with pytest.raises(CheckpointError, match=r"missing time_embed\.0\.weight, .* and \d+ more;"):
        load_checkpoint(directory)


def test_existing_directory_is_replaced_only_with_force(tmp_path):
    directory = tmp_path / "model"
    digest = save(directory, FAMILIES["moe"]).sha256()
    with pytest.raises(OutputError, match=r"exists.*--force"):
        save(directory, FAMILIES["ldm"])
    assert load_checkpoint(directory).sha256() == digest
    save(directory, FAMILIES["ldm"], force=True)
    assert not (directory / "expert_1.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_force_replaces_only_checkpoints(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(OutputError, match=r"holds files but no config\.json"):
        save(tmp_path / "photos", FAMILIES["ldm"], force=True)
    directory = save(tmp_path / "model", FAMILIES["ldm"]).directory
    (directory / "cat.png").touch()
    with pytest.raises(OutputError, match=r"holds other files \(cat\.png\)"):
        save(directory, FAMILIES["ldm"], force=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a directory"):
        save(tmp_path / "file", FAMILIES["ldm"], force=True)


@pytest.mark.parametrize(
    ("count", "change", "message"),
    [
        (1, lambda s: None, "got 1 experts, expected 2"),
        (3, lambda s: None, "got more than 2 experts"),
        (2, lambda s: s.pop("out.2.bias"), r"weights for expert_0\.safetensors: missing out\.2\.bias"),
        (
            2,
            lambda s: s.update({"out.2.bias": torch.full((3,), 1e6)}),
            r"as torch\.float16: out\.2\.bias is not finite",
        ),
    ],
    ids=["too-few", "too-many", "missing-key", "overflow"],
)
def test_old_checkpoint_is_kept_if_the_weights_do_not_fit(count, change, message, tmp_path):
    directory = tmp_path / "model"
    config = FAMILIES["moe"]
    digest = save(directory, config).sha256()
    experts, decoder = make_networks(config)
    states = [dict(experts[0].state_dict()) for _ in range(count)]
    change(states[0])
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(directory, config, states, decoder.state_dict(), force=True, dtype=torch.float16)
    assert load_checkpoint(directory).sha256() == digest
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_failed_rename_restores_the_old_checkpoint(tmp_path, monkeypatch):
    directory = tmp_path / "model"
    digest = save(directory, FAMILIES["ldm"]).sha256()
    rename = Path.rename

    def fail_on_new(self, target):
        if self.name == "new":
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OutputError, match="no space left"):
        save(directory, FAMILIES["moe"], force=True)
    assert load_checkpoint(directory).sha256() == digest
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_interrupt_between_the_renames_restores_the_old_checkpoint(tmp_path, monkeypatch):
    directory = tmp_path / "model"
    digest = save(directory, FAMILIES["ldm"]).sha256()
    rename = Path.rename

    def interrupted(self, target):
        result = rename(self, target)
        if self == directory:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(directory, FAMILIES["moe"], force=True)
    assert load_checkpoint(directory).sha256() == digest
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


KILLED = """
import os, signal, sys
from pathlib import Path
from test_checkpoint import FAMILIES, make_networks
from moesr.training.checkpoint import save_checkpoint

experts, decoder = make_networks(FAMILIES["moe"])

def killed_at_the_second():
    yield experts[0].state_dict()
    os.kill(os.getpid(), signal.SIGKILL)

save_checkpoint(Path(sys.argv[1]), FAMILIES["moe"], killed_at_the_second(), decoder.state_dict(), force=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")
def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    directory = tmp_path / "model"
    digest = save(directory, FAMILIES["moe"]).sha256()
    command = [sys.executable, "-c", KILLED, str(directory)]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=found, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert load_checkpoint(directory).sha256() == digest
    save(directory, FAMILIES["moe"], force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def numbers(kind, path=()):
    """Yield the path of every number in a configuration and the annotation of its field."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        yield from _numbers(hint, (*path, name))


def _numbers(hint, path):
    inner = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield from numbers(hint, path)
    elif hint in (int, float) or (typing.get_origin(hint) is typing.Annotated and inner[0] in (int, float)):
        yield path, hint
    else:
        for arm in inner if typing.get_origin(hint) is not typing.Annotated else inner[:1]:
            if arm not in (type(None), Ellipsis) and not isinstance(arm, str):
                yield from _numbers(arm, path)


@pytest.mark.parametrize("kind", [ModelConfig, StableSRConfig, StableDiffusionConfig])
def test_every_number_of_a_configuration_has_a_range(kind):
    found = [(".".join(path), hint) for path, hint in numbers(kind)]
    assert len(found) > 20
    open_ended = [name for name, hint in found if typing.get_origin(hint) is not typing.Annotated]
    assert [name for name in open_ended if not name.startswith("schedule.")] == []


@pytest.mark.parametrize("value", [2**31, 10**400, -1, 1e308])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("unet", "res_blocks"),
        ("unet", "width"),
        ("decoder", "channels"),
        ("decoder", "fusion_blocks"),
        ("decoder", "codebook_size"),
        (None, "steps"),
        (None, "scale"),
    ],
)
def test_a_number_out_of_range_is_refused_before_a_network_is_built(tmp_path, place, name, value):
    copy = shutil.copytree(SAVED_DEMO, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (config[place] if place else config)[name] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{name} is .*expected"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["channel_mult", "attention_factors"])
def test_list_that_is_too_long_is_refused(tmp_path, name):
    copy = shutil.copytree(SAVED_DEMO, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["unet"][name] = [1] * 10_000
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"unet\.{name} is .*expected a list of \d to 10 entries"):
        load_checkpoint(copy)
