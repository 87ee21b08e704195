"""Weights in files beside an ONNX file: sizes, reproducible bytes, and entries in the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import random_expert, write_checkpoint

from moesr.export import cli, external_weights
from moesr.export.graphs.expert import expert_graph
from moesr.export.lowering import lowering
from moesr.runtime import EngineError, Upscaler
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.engine.onnx_external_data import external_files

LARGEST = 40_000  # bytes per file; the largest tensor of the tiny networks has more


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, Path]:
    """One graph with all weights inside, and two with weights in files beside them."""
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = write_checkpoint(folder / "tiny")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("inside", "beside", "again"):
            found[name] = folder / name
            options = "-o", str(found[name]), "--tile", "32", "--quiet"
            assert cli.main([str(checkpoint), *options]) == 0
            patch.setattr(external_weights, "INSIDE_BYTES", 100_000)
            patch.setattr(external_weights, "FILE_BYTES", LARGEST)
    return found


def test_large_weights_are_written_to_separate_files(engines):
    inside, beside = read_manifest(engines["inside"]), read_manifest(engines["beside"])
    for role, graph in beside.graphs.items():
        assert len(graph.data) > 2 and not inside.graphs[role].data
        assert [f.file for f in graph.data] == [f"{role}.weights_{k}" for k in range(len(graph.data))]
        assert external_files(engines["beside"] / graph.file) == {f.file for f in graph.data}
        sizes = [(engines["beside"] / f.file).stat().st_size for f in graph.data]
        assert not any(size % external_weights.ALIGNMENT for size in sizes)
        left, before = ((engines[n] / graph.file).stat().st_size for n in ("beside", "inside"))
        assert left < before / 5
    names = {path.name for path in engines["beside"].iterdir()}
    assert names == {"manifest.json", *(file.file for file in beside.files)}


def test_weight_files_keep_to_the_size_limit(engines):
    """A tensor larger than the limit has a file of its own."""
    manifest = read_manifest(engines["beside"])
    sizes = [(engines["beside"] / f.file).stat().st_size for g in manifest.graphs.values() for f in g.data]
    assert sum(size > LARGEST + external_weights.ALIGNMENT for size in sizes) < len(sizes) / 2
    assert min(sizes) < LARGEST


def test_same_graph_gives_the_same_bytes(engines):
    assert read_manifest(engines["again"]).files == read_manifest(engines["beside"]).files


def test_other_weights_change_the_onnx_file(tmp_path, monkeypatch):
    """Plans are identified by the hash of the ONNX file."""
    monkeypatch.setattr(external_weights, "INSIDE_BYTES", 0)
    found = []
    for k in range(2):
        with torch.inference_mode():
            built = expert_graph(random_expert(k), 8, lowering("gpu"))
        found.append(external_weights.write_graph(tmp_path, "expert", built))
    assert found[0][0].sha256 != found[1][0].sha256
    assert [f.file for f in found[0][1]] == [f.file for f in found[1][1]] == ["expert.weights_0"]


def test_results_do_not_depend_on_the_place_of_the_weights(engines):
    image = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)
    results = []
    for name in ("inside", "beside"):
        with Upscaler(engines[name], device="cpu") as up:
            results.append(up(image, steps=2))
    np.testing.assert_array_equal(*results)


def test_message_names_damaged_weights(engines):
    path = engines["again"] / "expert_1.weights_1"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"expert_1\.weights_1: damaged or replaced"):
        read_manifest(engines["again"])
    path.unlink()
    with pytest.raises(EngineError, match=r"expert_1\.weights_1: missing"):
        read_manifest(engines["again"])
