"""The adapter with the arguments of a diffusers pipeline."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engines import build_engine
from PIL import Image

from moesr.runtime import InputError, Upscaler, UsageError
from moesr.runtime.integrations.diffusers import DiffusersUpscaler

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(4)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upscaler]:
    engine = build_engine(tmp_path_factory.mktemp("engine"), prompts=("sharp", "blurry"))
    with Upscaler(engine, backend="onnxruntime", threads=1) as upscaler:
        yield upscaler


@pytest.fixture
def pipe(up: Upscaler) -> DiffusersUpscaler:
    return DiffusersUpscaler(up)


def picture(width: int = 16, height: int = 12) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def test_arguments_are_those_of_a_pipeline(pipe: DiffusersUpscaler, up: Upscaler):
    image = picture()
    out = pipe(image=image, prompt="", num_inference_steps=3, guidance_scale=2.0, generator=5)
    assert out.seeds == (5,) and out["images"] is out.images is out[0]
    want = up(image, steps=3, guidance=2.0, seed=5)
    np.testing.assert_array_equal(np.asarray(out.images[0]), np.asarray(want))
    (images,) = pipe(
        image, num_inference_steps=3, guidance_scale=2.0, generator=5, color_fix="none", return_dict=False
    )
    want = up(image, steps=3, guidance=2.0, seed=5, color_fix="none")
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(want))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_every_kind_of_image_gives_every_kind_of_result(pipe: DiffusersUpscaler, output_type: str):
    pixels = RNG.integers(0, 256, (2, 12, 16, 3), np.uint8)
    floats = pixels.astype(np.float32) / 255
    kinds: list[Any] = [
        [Image.fromarray(one) for one in pixels],
        pixels,
        floats,
        [floats[0], floats[1]],
        floats.astype(np.float64),
        torch.from_numpy(floats.transpose(0, 3, 1, 2)),
        [torch.from_numpy(one.transpose(2, 0, 1)) for one in floats],
    ]
    found = []
    for kind in kinds:
        images = pipe(kind, num_inference_steps=1, generator=3, output_type=output_type).images
        if output_type == "pil":
            assert [(one.mode, one.size) for one in images] == [("RGB", (64, 48))] * 2
            values = np.stack([np.asarray(one) / 255 for one in images])
        elif output_type == "np":
            assert images.dtype == np.float32 and images.shape == (2, 48, 64, 3)
            values = images
        else:
            assert images.dtype == torch.float32 and images.shape == (2, 3, 48, 64)
            values = images.permute(0, 2, 3, 1).numpy()
        found.append(values)
        np.testing.assert_allclose(values, found[0], atol=2.01 / 255)


def test_images_of_several_sizes_and_modes(pipe: DiffusersUpscaler):
    images = [picture(), picture(8, 10), Image.new("LA", (6, 5))]
    out = pipe(images, num_inference_steps=1)
    assert [(one.mode, one.size) for one in out.images] == [
        ("RGB", (64, 48)),
        ("RGB", (32, 40)),
        ("LA", (24, 20)),
    ]
    arrays = pipe(images, num_inference_steps=1, output_type="np").images
    assert [one.shape for one in arrays] == [(48, 64, 3), (40, 32, 3), (20, 24, 2)]
    grey = pipe(np.zeros((12, 16), np.uint8), num_inference_steps=1, output_type="pt").images
    assert grey.shape == (1, 1, 48, 64)


def test_generators_become_seeds(pipe: DiffusersUpscaler):
    images = [picture(), picture()]

    def seeds(generator: Any) -> tuple[int, ...]:
        return pipe(images, num_inference_steps=1, generator=generator).seeds

    assert seeds(2**64 - 1) == (2**64 - 1, 0)
    generator = torch.Generator().manual_seed(1)
    first = seeds(generator)
    assert first[0] != first[1] and seeds(torch.Generator().manual_seed(1)) == first != seeds(generator)
    assert seeds(np.random.default_rng(1)) == seeds(np.random.default_rng(1))
    pair = [torch.Generator().manual_seed(1), 8]
    assert seeds(pair) == (first[0], 8)
    assert seeds(None) != seeds(None)
    for wrong in (1.5, "0", True, [1], -1):
        with pytest.raises(UsageError):
            seeds(wrong)


@pytest.mark.parametrize("with_torch", [True, False])
def test_callbacks_see_and_replace_latents(
    pipe: DiffusersUpscaler, up: Upscaler, monkeypatch: pytest.MonkeyPatch, with_torch: bool
):
    if not with_torch:
        monkeypatch.delitem(sys.modules, "torch")
    seen: list[tuple[int, float]] = []

    def callback(given: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe and isinstance(values["latents"], torch.Tensor if with_torch else np.ndarray)
        assert values["latents"].shape == (1, 3, 16, 16)
        preview = given.preview()
        assert preview is not None and preview.size == (16, 12)
        seen.append((step, timestep))
        return {"latents": values["latents"] * 0}

    image = picture()
    out = pipe(image, num_inference_steps=3, generator=1, callback_on_step_end=callback)
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] > seen[2][1]
    assert pipe.num_timesteps == 3 and pipe.preview() is None

    def blank(step: Any) -> None:
        step.latents = np.zeros_like(step.latents)

    want = up(image, steps=3, seed=1, on_step=blank)
    np.testing.assert_array_equal(np.asarray(out.images[0]), np.asarray(want))
    same = pipe(image, num_inference_steps=3, generator=1, callback_on_step_end=lambda *_: {})
    np.testing.assert_array_equal(np.asarray(same.images[0]), np.asarray(up(image, steps=3, seed=1)))


def test_an_interrupted_call_decodes_what_it_has(pipe: DiffusersUpscaler, up: Upscaler):
    steps = []

    def callback(given: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        assert not values
        given._interrupt = step == 1
        return {}

    image, clean = picture(), []
    options: dict[str, Any] = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": []}
    out = pipe([image, image], num_inference_steps=50, generator=1, **options)
    assert steps == [0, 1] and pipe.interrupt

    def stop(step: Any) -> None:
        clean.append(step.clean)
        step.latents, step.stopped = step.clean, step.step == 1

    np.testing.assert_array_equal(np.asarray(out.images[0]).shape, (48, 64, 3))
    up(image, steps=50, seed=1, on_step=stop)
    assert len(clean) == 2
    assert len(out.images) == 2
    pipe(image, num_inference_steps=2, generator=1, callback_on_step_end=lambda *_: {})
    assert not pipe.interrupt


def test_what_cannot_be_followed_is_refused(pipe: DiffusersUpscaler, monkeypatch: pytest.MonkeyPatch):
    image = picture()
    pipe(image, prompt="sharp", negative_prompt="blurry", num_inference_steps=1)
    for arguments, words in (
        ({"prompt": "a cat"}, "leave prompt out, or export the engine with --prompt"),
        ({"negative_prompt": "bad"}, "leave negative_prompt out"),
        ({"output_type": "latent"}, "output_type is 'latent', expected one of pil, np, pt"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "expected some of latents"),
        ({"steps": 3}, "steps is called num_inference_steps here"),
        ({"num_inference_steps": 0}, "steps"),
    ):
        with pytest.raises(UsageError, match=words):
            pipe(image, **arguments)
    with pytest.raises(InputError, match="expected a PIL image"):
        pipe("photo.png")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match="which needs PyTorch; install torch"):
        pipe(image, output_type="pt")


def test_the_upscaler_has_none_of_these_names(up: Upscaler):
    with pytest.raises(TypeError):
        up(picture(), num_inference_steps=1)  # type: ignore[call-arg]
