"""The node of ComfyUI against a stand-in for its modules, with the signatures of its own sources."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_stub import Comfy, Interrupted
from engines import build_engine

from moesr.runtime import InputError, Upscaler, UsageError
from moesr.runtime.integrations import comfyui

torch = pytest.importorskip("torch")
WIDGETS = {
    "engine": "tiny",
    "steps": 2,
    "fidelity": -1.0,
    "seed": 7,
    "color_fix": "adain",
    "keep_loaded": False,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    build_engine(models / "moesr" / "tiny")
    (models / "moesr" / "not_an_engine").mkdir()
    return models


@pytest.fixture
def comfy(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comfy]:
    stub = Comfy(models)
    stub.install(monkeypatch)
    yield stub
    comfyui.CACHE.clear()


@pytest.fixture
def node(comfy: Comfy) -> Any:
    extension = asyncio.run(comfyui.comfy_entrypoint())
    (node,) = asyncio.run(extension.get_node_list())
    return node


def image(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).random((count, 12, 16, 3), np.float32))


def test_the_schema_lists_engines_and_widgets(node: Any):
    schema = node.define_schema()
    assert schema.node_id == "MoesrUpscale" and len(schema.outputs) == 1
    inputs = {one.id: one.values for one in schema.inputs}
    assert [*inputs] == ["image", *WIDGETS]
    assert inputs["engine"]["options"] == ["tiny", "demo-x4", "demo-x8"]
    assert inputs["seed"]["control_after_generate"] and inputs["seed"]["max"] == 2**64 - 1


def test_images_equal_those_of_the_upscaler(node: Any, comfy: Comfy, models: Path):
    batch = image()
    (got,) = node.execute(batch, **WIDGETS).result
    assert got.shape == (2, 48, 64, 3) and got.dtype == torch.float32
    with Upscaler(models / "moesr" / "tiny") as up:
        for one, want in zip(batch, got, strict=True):
            np.testing.assert_array_equal(up(one.numpy(), steps=2, seed=7), want.numpy())
    assert [(value, total) for value, total, _ in comfy.updates] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    kind, shown, most = comfy.updates[0][2]
    assert (kind, shown.size, most) == ("JPEG", (16, 12), 512)


def test_fidelity_and_steps_default_to_the_engine(node: Any):
    (own,) = node.execute(image(1), **WIDGETS | {"steps": 0}).result
    (given,) = node.execute(image(1), **WIDGETS | {"steps": 4, "fidelity": 1.0}).result
    (free,) = node.execute(image(1), **WIDGETS | {"steps": 4, "fidelity": 0.0}).result
    assert torch.equal(own, given) and not torch.equal(own, free)


def test_an_interruption_ends_the_work(node: Any, comfy: Comfy):
    comfy.interrupt_after = 1
    with pytest.raises(Interrupted):
        node.execute(image(), **WIDGETS | {"steps": 500, "keep_loaded": True})
    assert len(comfy.updates) == 1 and comfyui.CACHE._upscaler is None


def test_an_engine_is_kept_only_on_request_and_until_models_are_unloaded(node: Any, comfy: Comfy):
    node.execute(image(1), **WIDGETS)
    assert comfyui.CACHE._upscaler is None
    node.execute(image(1), **WIDGETS | {"keep_loaded": True})
    kept = comfyui.CACHE._upscaler
    node.execute(image(1), **WIDGETS | {"keep_loaded": True})
    assert kept is not None and comfyui.CACHE._upscaler is kept
    asyncio.run(comfyui.comfy_entrypoint())  # loaded twice, it still asks ComfyUI once
    sys.modules["comfy.model_management"].unload_all_models()
    assert comfy.unloaded == 1 and comfyui.CACHE._upscaler is None
    assert not kept._release.alive, "the engine is closed"
    node.execute(image(1), **WIDGETS)


def test_wrong_images_and_engines_are_refused(node: Any):
    with pytest.raises(UsageError, match="no engine 'gone' in models/moesr; expected one of tiny, demo-x4"):
        node.execute(image(), **WIDGETS | {"engine": "gone"})
    with pytest.raises(InputError, match=r"tensor \[B, H, W, C\]"):
        node.execute(image()[0], **WIDGETS)
