"""Previews of images during sampling, and callbacks after every step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import build_engine
from rigs import CudaRig, Rig

from moesr.runtime import EngineError, Upscaler, UsageError
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.engine.preview_map import PreviewMap
from moesr.runtime.images import latent_preview
from moesr.runtime.loop.sampling_watch import Watch
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.upscaler import SamplingStep

RNG = np.random.default_rng(5)
COLORS = PreviewMap(((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)), (0.1, 0.0, -0.1))


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upscaler]:
    engine = build_engine(tmp_path_factory.mktemp("engine"))
    with Upscaler(engine, backend="onnxruntime", threads=1) as upscaler:
        yield upscaler


def image(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def eventually(ask: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while (found := ask()) is None:
        assert time.monotonic() < end
        time.sleep(0.002)
    return found


def test_every_step_is_shown_in_order_and_changes_nothing(up: Upscaler):
    lr, steps, threads = image(20, 30, 3), [], set()

    def on_step(step: SamplingStep) -> None:
        threads.add(threading.current_thread())
        steps.append(step)

    shown = up(lr, steps=3, seed=4, on_step=on_step)
    np.testing.assert_array_equal(shown, up(lr, steps=3, seed=4))
    assert [(one.step, one.steps, one.image) for one in steps] == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]
    assert steps[0].t > steps[1].t > steps[2].t and threads == {threading.current_thread()}
    for one in steps:
        assert one.latents.shape == one.clean.shape and one.latents.dtype == np.float32
        preview = one.preview()
        assert preview is not None
        assert preview.shape == (20, 30, 3) and preview.dtype == np.uint8
    assert not np.array_equal(steps[0].latents, steps[1].latents), "the arrays of a step are its own"


def test_the_clean_latent_is_the_one_that_the_network_predicts(up: Upscaler):
    lr, steps, m = image(20, 30, 3), [], up.manifest
    up(lr, steps=3, on_step=steps.append)
    table = SAMPLERS["ddpm"].table(m.schedule, 3, m.expert_ranges)
    cond = lr.transpose(2, 0, 1) / 127.5 - 1
    for before, after in pairwise(steps):
        a, z = table.alpha_bar[after.step], before.latents
        eps = 0.9 * z + 0.1 * cond + 1e-4 * after.t + 0.01 * table.expert[after.step]
        np.testing.assert_allclose(after.clean, (z - np.sqrt(1 - a) * eps) / np.sqrt(a), atol=2e-4)


def test_a_callback_may_replace_the_latents(up: Upscaler):
    lr = image(16, 16, 3)

    def zero(step: SamplingStep) -> None:
        if step.step == step.steps - 1:
            step.latents = np.zeros_like(step.latents)

    def zero_in_place(step: SamplingStep) -> None:
        if step.step == step.steps - 1:
            step.latents[:] = 0.0

    changed = up(lr, steps=2, on_step=zero)
    assert not np.array_equal(changed, up(lr, steps=2))
    np.testing.assert_array_equal(changed, up(lr, steps=2, on_step=zero_in_place))
    np.testing.assert_array_equal(
        changed, up(lr, steps=2, seed=9, on_step=zero)
    )  # no noise is left of any seed

    def cut(step: SamplingStep) -> None:
        step.latents = step.latents[:, :2]

    with pytest.raises(UsageError, match="latents have the shape"):
        up(lr, steps=2, on_step=cut)


def test_an_exception_of_a_callback_ends_the_image(up: Upscaler):
    def fail(step: SamplingStep) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        up(image(16, 16, 3), steps=50, on_step=fail)
    up(image(16, 16, 3), steps=1)


def test_other_images_go_on_while_one_waits_for_its_callback(up: Upscaler):
    lr, inner = image(16, 16, 3), []

    def upscale_another(step: SamplingStep) -> None:
        inner.append(up(lr, steps=2))

    up(lr, steps=2, on_step=upscale_another)
    assert len(inner) == 2 and np.array_equal(inner[0], inner[1])


def test_batches_and_maps_name_the_image(up: Upscaler):
    seen = []
    batch = RNG.random((3, 3, 16, 16), np.float32)
    up(batch, steps=2, on_step=lambda step: seen.append((step.image, step.step)))
    assert sorted(seen) == [(i, k) for i in range(3) for k in range(2)]
    seen.clear()
    list(up.map([image(16, 16, 3)] * 3, steps=1, on_step=lambda step: seen.append((step.image, step.step))))
    assert sorted(seen) == [(0, 0), (1, 0), (2, 0)]


def test_an_engine_without_a_decoder_waits_after_its_last_step(tmp_path: Path):
    engine = build_engine(tmp_path / "engine")
    manifest = read_manifest(engine)
    graphs = {role: graph for role, graph in manifest.graphs.items() if role != "decoder"}
    write_manifest(replace(manifest, tile=16, latent_factor=1, graphs=graphs), engine)

    def blank(step: SamplingStep) -> None:
        assert np.shape(step.preview()) == (32, 24, 3)
        step.latents = np.zeros_like(step.latents)

    with Upscaler(engine, backend="onnxruntime", threads=1) as up:
        result = up(image(8, 6, 3), steps=2, color_fix="none", on_step=blank)
    assert (result == 128).all()


def test_a_handle_gives_previews_while_it_samples(up: Upscaler):
    handle = up.submit(image(20, 30, 3), steps=1000)
    assert handle.preview() is None
    first = eventually(handle.preview)
    assert first.shape == (20, 30, 3) and first.dtype == np.uint8
    handle.cancel()
    eventually(lambda: True if handle.preview() is None else None)


def test_nothing_is_computed_unless_somebody_asks(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    fetched = []
    download = HostDevice.download
    monkeypatch.setattr(
        HostDevice, "download", lambda self, canvas, *rows: fetched.append(1) or download(self, canvas, *rows)
    )
    monkeypatch.setattr(latent_preview, "picture", None)
    up(image(16, 16, 3), steps=5)
    assert len(fetched) == 1  # the result
    steps: list[SamplingStep] = []
    up(image(16, 16, 3), steps=5, on_step=steps.append)  # nobody calls `preview`


def test_a_large_latent_is_shown_at_most_512_pixels_wide(up: Upscaler):
    shapes = []
    up(image(8, 1100, 3), steps=1, on_step=lambda step: shapes.append(np.shape(step.preview())))
    assert shapes == [(2, 366, 3)]  # 8 x 1100 latent pixels in blocks of 3 x 3


def test_the_map_of_a_manifest_is_used_and_checked(tmp_path: Path):
    engine = build_engine(tmp_path / "engine", preview=COLORS)
    assert read_manifest(engine).preview == COLORS
    with pytest.raises(EngineError, match=r"preview\.weights are expected to be 3 rows of 3"):
        build_engine(tmp_path / "wrong", preview=PreviewMap(((0.0,), (0.0,), (0.0,)), (0.0, 0.0, 0.0)))


def test_brightness_is_that_of_the_latent_and_hue_that_of_the_input():
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    lr = RNG.uniform(-0.5, 0.5, (24, 32, 3)).astype(np.float32)
    detail = RNG.uniform(-0.3, 0.3, (24, 32)).astype(np.float32)
    brightness = lr @ luma + detail
    clean = np.stack([-2 * brightness + 0.4, RNG.standard_normal((24, 32)).astype(np.float32)])
    shown = latent_preview.picture(clean, lr)
    assert shown is not None
    values = shown / 127.5 - 1
    assert np.corrcoef((values @ luma).ravel(), brightness.ravel())[0, 1] > 0.99
    hue = lr - (lr @ luma)[..., None]
    np.testing.assert_allclose(values - (values @ luma)[..., None], hue, atol=0.02)

    noisy = RNG.standard_normal((3, 24, 32)).astype(np.float32) * 30
    faint = latent_preview.picture(noisy, lr)
    assert faint is not None
    assert ((faint / 127.5 - 1) @ luma).std() < 0.1, "noise is faint, not saturated"


def test_a_map_colors_latents_without_an_input_or_adds_them_to_it():
    weights, bias = np.array(COLORS.weights), np.array(COLORS.bias)
    clean = RNG.uniform(-1, 1, (3, 4, 5)).astype(np.float32)
    rgb = clean.transpose(1, 2, 0) * 0.5 + bias
    alone = latent_preview.picture(clean, None, weights, bias)
    np.testing.assert_allclose(alone, rgb * 127.5 + 127.5, atol=0.51)
    lr = RNG.uniform(-0.3, 0.3, (4, 5, 3)).astype(np.float32)
    added = latent_preview.picture(clean, lr, weights, bias, adds_lr=True)
    np.testing.assert_allclose(added, np.clip((lr + rgb) * 127.5 + 127.5, 0, 255), atol=0.51)
    assert latent_preview.picture(clean, None) is None
    assert latent_preview.picture(clean, None, weights, bias, adds_lr=True) is None


def test_a_gpu_shows_the_same_steps(up: Upscaler, tmp_path: Path):
    lr, seen = image(96, 160, 3), []
    for rig in (Rig(up.manifest), CudaRig(up.manifest, tmp_path)):
        job = rig.job(24, 40, lr)
        job._condition = lr[::4, ::4].copy()
        job.watch, steps = Watch(every_step=True), []
        rig.worker.submit(job)
        while not job.done:
            if step := job.watch.step:
                steps.append((step.clean, step.latents, step.preview()))
                step.latents = step.latents * np.float32(0.5)
                job.watch.release()
                rig.worker.wake()
            time.sleep(0.001)
        assert job.error is None
        seen.append((steps, job.image))
        rig.worker.close()
    (host, result), (gpu, other) = seen
    assert len(host) == len(gpu) == 4
    for one, two in zip(host, gpu, strict=True):
        np.testing.assert_allclose(one[0], two[0], atol=1e-4)
        np.testing.assert_allclose(one[1], two[1], atol=1e-4)
        assert np.abs(one[2].astype(int) - two[2]).max() <= 1
    np.testing.assert_allclose(result, other, atol=1e-4)
