"""StableSR engines of tiny networks: precisions, weights in separate files, no feature wrapping."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from stablesr import TINY, write_checkpoint

from moesr.export import cli, external_weights
from moesr.export.prompts import GUIDANCE, PUBLISHED
from moesr.runtime import Upscaler, UsageError
from moesr.runtime.cli import doctor
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest

EMPTY, POSITIVE, _ = PUBLISHED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", TINY)


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "engine"
    export(checkpoint, directory, "--guidance", "3")
    return directory


def export(checkpoint: Path, directory: Path, *flags: str) -> Manifest:
    """Export a checkpoint and return the manifest; the tile is the size that the model was trained on."""
    assert cli.main([str(checkpoint), "-o", str(directory), "--quiet", *flags]) == 0
    manifest = read_manifest(directory)
    assert manifest.tile == TINY.tile
    return manifest


def upscaled(directory: Path, **options) -> np.ndarray:
    lr = np.random.default_rng(2).integers(0, 256, (17, 18, 3), np.uint8)
    with Upscaler(directory, device="cpu") as up:
        return up(lr, steps=1, **options).astype(float)


FLAGS = {
    "fp16": ("--fp16",),
    "bf16": ("--bf16",),
    "stored": ("--store", "fp16"),
    "both": ("--target", "both", "--fp16"),
    "both-bf16": ("--target", "both", "--bf16"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "both-bf16" else ()) for kind in FLAGS]
)
def test_engines_in_every_precision(kind: str, checkpoint: Path, plain: Path, tmp_path: Path):
    manifest = export(checkpoint, tmp_path / "engine", *FLAGS[kind], "--guidance", "3")
    assert {g.precision for g in manifest.graphs.values()} == {kind if kind in ("fp16", "bf16") else "fp32"}
    for graph in manifest.graphs.values():
        assert all(0 < a.parity.relative_l2 < a.parity.threshold for a in graph.arrangements)
    if kind.startswith("both"):
        half = {"both": "fp16", "both-bf16": "bf16"}[kind]
        assert {g.variants["gpu"].precision for g in manifest.graphs.values()} == {half}
    assert np.abs(upscaled(tmp_path / "engine") - upscaled(plain)).mean() < 3


@pytest.mark.parametrize("flags", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_weights_in_separate_files(
    flags: tuple[str, ...], checkpoint: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(external_weights, "INSIDE_BYTES", 200_000)
    monkeypatch.setattr(external_weights, "FILE_BYTES", 300_000)
    manifest = export(checkpoint, tmp_path / "beside", "--guidance", "3", *flags)
    assert len(manifest.graphs["expert_0"].data) > 2
    names = {path.name for path in (tmp_path / "beside").iterdir()}
    assert names == {"manifest.json", *(file.file for file in manifest.files)}
    error = np.abs(upscaled(tmp_path / "beside") - upscaled(plain))
    assert error.max() == 0 if not flags else error.mean() < 3


def test_decoder_without_feature_wrapping_has_no_fidelity(tmp_path: Path):
    """Such a decoder is the result of the first stage of training. The prompts are given as token ids."""
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, fusion_level=None))
    told = "--prompt", EMPTY, "--negative-prompt", POSITIVE
    manifest = export(write_checkpoint(tmp_path / "plain", config), tmp_path / "engine", *told)
    assert (manifest.prompts, manifest.guidance) == ((EMPTY, POSITIVE), GUIDANCE)
    assert [spec.name for spec in manifest.graphs["decoder"].inputs] == ["z"]
    assert upscaled(tmp_path / "engine").shape == (68, 72, 3)
    with pytest.raises(UsageError, match=r"fidelity is 1, .*takes no features .*--cfw FILE"):
        upscaled(tmp_path / "engine", fidelity=1.0)


def test_doctor_names_the_prompts(plain: Path, capsys: pytest.CaptureFixture):
    assert doctor.main(["--engine", str(plain), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "'(masterpiece:2), (best quality:2)" in out and "guidance 3" in out
