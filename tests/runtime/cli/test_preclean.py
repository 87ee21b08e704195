"""Pre-cleaning with any ONNX super-resolution network: tiles, half size, pixel types, refused networks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from engines import build_engine
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from moesr.runtime.cli import preclean
from moesr.runtime.cli.preclean import PreCleaner
from moesr.runtime.cli.run import main
from moesr.runtime.errors import EngineError, NonFiniteError
from moesr.runtime.images import provenance
from moesr.runtime.images.reading import load
from moesr.runtime.images.resize import imresize
from moesr.runtime.upscaler import Upscaler

BLUR = 5  # side of the network's kernel in pixels


def network(
    path: Path,
    scale: int = 4,
    *,
    sides: tuple[int | str, int | str] = ("h", "w"),
    channels: int = 3,
    kind: int = TensorProto.FLOAT,
    gain: float = 1.0,
    operator: str = "Identity",
    batch: int = 1,
    inputs: int = 1,
) -> Path:
    """Write a network as an ONNX file: nearest-neighbor upscaling, then a blur over `BLUR` pixels."""
    np_type = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    kernel = np.full((channels, 1, BLUR, BLUR), gain / BLUR**2, np_type)
    pad = BLUR // 2
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["big"], mode="nearest"),
        helper.make_node("Conv", ["big", "kernel"], ["soft"], group=channels, pads=[pad] * 4),
        helper.make_node(operator, ["soft"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 1, scale, scale], np.float32), "scales"),
        numpy_helper.from_array(kernel, "kernel"),
    ]
    shape: list[int | str | None] = [batch, channels, *sides]
    given = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "other")[:inputs]]
    made = [helper.make_tensor_value_info("y", kind, [batch, channels, "H", "W"])]
    graph = helper.make_graph(nodes, "sr", given, made, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def picture(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """Return a smooth image with some noise, in which seams would show."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (5, 6, channels), np.uint8)
    image = imresize(coarse, height, width).astype(np.float32) / 255 + rng.normal(
        0, 0.02, (height, width, channels)
    )
    return np.rint(np.clip(image, 0, 1) * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(150, 97), (33, 200), (7, 5)], ids=str)
def test_tiles_leave_no_seams(scale, size, tmp_path, monkeypatch):
    """Tiles give every pixel of the whole image; odd sizes are rounded up when they are halved."""
    cleaner = PreCleaner(network(tmp_path / "sr.onnx", scale))
    assert cleaner.scale == scale
    image = picture(*size)
    monkeypatch.setattr(preclean, "TILE_PX", 256)
    whole = cleaner(image)
    assert whole.shape == (-(-size[0] * scale // 2), -(-size[1] * scale // 2), 3)
    monkeypatch.setattr(preclean, "TILE_PX", 64)
    tiled = cleaner(image)
    assert np.abs(tiled.astype(int) - whole).max() <= 1
    if min(size) > 4 * BLUR:
        close = imresize(image, *whole.shape[:2]).astype(int) - whole
        assert np.abs(close).mean() < 8


def test_edges_are_not_darkened(tmp_path):
    """The network pads with black; pixels that depend on its padding are not used."""
    for size in ((40, 40), (1, 1), (2, 3)):
        image = np.full((*size, 3), 200, np.uint8)
        assert np.abs(PreCleaner(network(tmp_path / "sr.onnx"))(image).astype(int) - 200).max() <= 1


@pytest.mark.parametrize("sides", [(64, 48), (65, 47), (64, "w")], ids=str)
@pytest.mark.parametrize("scale", [3, 4])
def test_networks_of_fixed_size(sides, scale, tmp_path):
    image = picture(150, 97)
    fixed = PreCleaner(network(tmp_path / "fixed.onnx", scale, sides=sides))(image)
    free = PreCleaner(network(tmp_path / "free.onnx", scale))(image)
    assert fixed.shape == free.shape
    assert np.abs(fixed.astype(int) - free).max() <= 1


def test_size_of_tiles_does_not_depend_on_the_image(tmp_path, monkeypatch):
    cleaner, seen = PreCleaner(network(tmp_path / "sr.onnx", 2)), []
    run = cleaner._run
    monkeypatch.setattr(cleaner, "_run", lambda tile: (seen.append(tile.shape[:2]), run(tile))[1])
    cleaner(picture(500, 400))
    cleaner(picture(20, 40))
    assert set(seen) == {(192, 192), (64, 96)}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_pixel_types(dtype, channels, tmp_path):
    cleaner = PreCleaner(network(tmp_path / "sr.onnx"))
    image = np.maximum(picture(20, 30, channels, dtype), 1)
    got = cleaner(image)
    assert got.dtype == dtype and got.shape == (40, 60, channels)
    if channels in (2, 4):  # no pixel is fully transparent
        np.testing.assert_array_equal(got[..., -1], imresize(image[..., -1], 40, 60))
    rgb = np.repeat(image[..., :1], 3, axis=2) if channels < 3 else image[..., :3]
    want = cleaner(np.ascontiguousarray(rgb))[..., 0].astype(int)
    assert np.abs(got[..., 0] - want).max() <= 1


def test_half_precision(tmp_path):
    image = picture(20, 30)
    half = PreCleaner(network(tmp_path / "half.onnx", kind=TensorProto.FLOAT16))(image)
    full = PreCleaner(network(tmp_path / "full.onnx"))(image)
    assert np.abs(half.astype(int) - full).max() <= 1


UNFIT = {
    "no scale": ({"scale": 1}, "makes 64x64x3 from 64x64x3"),
    "grey": ({"channels": 1}, "takes tensor(float) 1x1x?x?"),
    "batches": ({"batch": 2}, "takes tensor(float) 2x3x?x?"),
    "two inputs": ({"inputs": 2}, "has 2 inputs and 1 outputs"),
    "small": ({"sides": (16, 16)}, "takes tiles of 16x16 only"),
    "range": ({"gain": 255.0}, "gives 127.5 for grey 0.5"),
    "doubles": ({"kind": TensorProto.DOUBLE}, ""),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_unsuitable_networks_are_refused(fault, tmp_path):
    options, message = UNFIT[fault]
    path = network(tmp_path / "sr.onnx", **options)
    with pytest.raises(EngineError) as caught:
        PreCleaner(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "expected a super-resolution network: RGB in 0..1" in str(caught.value)


def test_files_that_are_not_networks_are_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(EngineError, match="cannot be run by onnxruntime"):
        PreCleaner(tmp_path / "text.onnx")
    with pytest.raises(EngineError, match="no such file"):
        PreCleaner(tmp_path / "absent.onnx")
    with pytest.raises(EngineError, match="is a directory"):
        PreCleaner(tmp_path)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(EngineError, match="is a pipe"):
        PreCleaner(tmp_path / "pipe.onnx")


def test_nan_fails_the_image(tmp_path):
    cleaner = PreCleaner(network(tmp_path / "sr.onnx", operator="Sqrt", gain=1.0))
    np.testing.assert_array_equal(cleaner(picture(20, 20)).shape, (40, 40, 3))
    cleaner = PreCleaner(network(tmp_path / "log.onnx", operator="Log"))
    with pytest.raises(NonFiniteError, match="NaN or infinite values for this image"):
        cleaner(np.zeros((20, 20, 3), np.uint8))


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=2)


def run(engine: Path, *arguments: object) -> int:
    return main(["--engine", str(engine), *map(str, arguments)])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_size_of_results_is_that_without_pre_cleaning(scale, engine, tmp_path):
    model = network(tmp_path / "sr.onnx", scale)
    Image.fromarray(picture(9, 13)).save(tmp_path / "a.png")
    assert run(engine, tmp_path / "a.png", "--pre-clean", model, "--quiet") == 0
    got = load(tmp_path / "a_x4.png").pixels
    assert got.shape == (36, 52, 3)
    with Upscaler(engine) as up:
        want = up(PreCleaner(model)(picture(9, 13)))
    want = want if want.shape == got.shape else imresize(want, 36, 52)
    np.testing.assert_array_equal(got, want)


def test_folder_is_cleaned_once(engine, tmp_path, capsys):
    """High bit depth, transparency and damage; a second run skips the results if the network is the same."""
    photos, model = tmp_path / "photos", network(tmp_path / "sr.onnx")
    photos.mkdir()
    Image.fromarray(picture(9, 13, 1, np.uint16)[..., 0]).save(photos / "deep.png")
    Image.fromarray(picture(9, 13, 4)).save(photos / "clear.png")
    (photos / "damaged.png").write_bytes(b"\x89PNG")
    out = tmp_path / "out"
    args = (photos, "-o", f"{out}/", "--pre-clean", model)
    assert run(engine, *args) == 1
    assert load(out / "deep_x4.png").pixels.dtype == np.uint16
    assert load(out / "clear_x4.png").pixels.shape == (36, 52, 4)
    mark = provenance.read(out / "clear_x4.png")
    assert mark is not None and mark.settings["pre_clean"].startswith("sr.onnx ")
    capsys.readouterr()
    assert run(engine, *args) == 1
    assert "2 skipped" in capsys.readouterr().err
    assert run(engine, photos, "-o", f"{out}/") == 1
    assert "pre_clean" in capsys.readouterr().err


def test_unsuitable_network_ends_the_run(engine, tmp_path, capsys):
    Image.fromarray(picture(9, 13)).save(tmp_path / "a.png")
    model = network(tmp_path / "sr.onnx", 1)
    assert run(engine, tmp_path / "a.png", "--pre-clean", model) == 3
    assert "expected a super-resolution network" in capsys.readouterr().err
    assert not (tmp_path / "a_x4.png").exists()
