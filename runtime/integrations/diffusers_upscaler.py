"""An Upscaler behind the arguments that users of diffusers know; diffusers itself is not needed.

    from moesr.runtime import Upscaler
    from moesr.runtime.integrations.diffusers import DiffusersUpscaler

    with Upscaler("demo-x4") as up:
        pipe = DiffusersUpscaler(up)
        large = pipe(image, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images[0]

Arguments that have no counterpart there are the options of `Upscaler` by their own names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from moesr.runtime.errors import InputError, UsageError
from moesr.runtime.images import arrays
from moesr.runtime.options import MAX_SEED, check_seed
from moesr.runtime.upscaler import SamplingStep, Upscaler

OUTPUT_TYPES = ("pil", "np", "pt")
TENSOR_INPUTS = ("latents",)
"""The tensors that a callback can ask for."""

StepEnd = Callable[[Any, int, float, dict[str, Any]], "Mapping[str, Any] | None"]


@dataclass(frozen=True)
class UpscalerOutput:
    """The results: `images` in the output type that was asked for, and the `seeds` of their noise."""

    images: Any
    seeds: tuple[int, ...]

    def __getitem__(self, key: str | int) -> Any:
        """Return a field by its name, or by its position as in a tuple (images,)."""
        return getattr(self, key) if isinstance(key, str) else (self.images,)[key]


class DiffusersUpscaler:
    """Calls an Upscaler with the arguments of a diffusers pipeline. One thread at a time uses it."""

    def __init__(self, upscaler: Upscaler) -> None:
        """Use an open Upscaler, which the caller closes."""
        self.upscaler = upscaler
        self._callback_tensor_inputs = list(TENSOR_INPUTS)
        self._interrupt = False
        self._step: SamplingStep | None = None
        self._num_timesteps = 0

    @property
    def interrupt(self) -> bool:
        """Whether the present call is to leave out its remaining steps; a callback sets `_interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """The number of sampling steps of the present or the last call."""
        return self._num_timesteps

    def preview(self) -> Image.Image | None:
        """Draw the image as the present step predicts it, in small; None outside of a callback."""
        pixels = self._step.preview() if self._step else None
        return None if pixels is None else Image.fromarray(pixels)

    def __call__(
        self,
        image: Any,
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSOR_INPUTS,
        **options: Any,
    ) -> UpscalerOutput | tuple[Any]:
        """Super-resolve one image or several.

        `image` is a PIL image, a NumPy array [H, W, C] or [B, H, W, C] (uint8, uint16, or floats from 0 to
        1), a PyTorch tensor [C, H, W] or [B, C, H, W] (floats from 0 to 1), or a list of these. The results
        are a list of PIL images ("pil"), float32 [B, H, W, C] ("np"), or a tensor float32 [B, C, H, W]
        ("pt") on the CPU; lists, if the images differ in size.

        The first image's seed is an integer `generator`, or is drawn from a `torch.Generator` or a
        `numpy.random.Generator` as an integer of 63 bits, which advances it: an equally seeded generator
        gives an equal image. The further images have the seeds that follow the integer, or their own draws; a
        list has a generator per image. Without one seeds are random. The output has the seeds.

        `callback_on_step_end(pipe, step, timestep, callback_kwargs)` is called after every sampling step of
        every image. `callback_kwargs["latents"]` is [1, C, h, w], a tensor if this process has imported
        PyTorch, else a NumPy array; sampling goes on with the latents in the dictionary that it returns.
        `pipe.preview()` draws the present state. If a callback or another thread sets `pipe._interrupt`, the
        remaining steps of this image are left out, and those of all further images after their first; what
        has been predicted so far is decoded.

        The prompts of an engine were fixed at its export: a `prompt` or `negative_prompt` is accepted only if
        it is empty or the engine's own. `options` are those of `Upscaler`. Raises UsageError and InputError,
        and what `Upscaler` raises.
        """
        self._check(output_type, callback_on_step_end_tensor_inputs, prompt, negative_prompt, options)
        torch = _torch() if output_type == "pt" else None
        pictures = _pictures(image)
        options |= {"steps": num_inference_steps, "guidance": guidance_scale}
        seeds = _seeds(generator, len(pictures))
        wanted = tuple(callback_on_step_end_tensor_inputs)
        self._interrupt, results = False, []

        def on_step(step: SamplingStep) -> None:
            self._step_end(step, callback_on_step_end, wanted)

        try:
            for picture, seed in zip(pictures, seeds, strict=True):
                results.append(self.upscaler(picture, seed=seed, on_step=on_step, **options))
        finally:
            self._step = None
        images = _as_output(results, output_type, torch)
        return UpscalerOutput(images, seeds) if return_dict else (images,)

    def _check(
        self,
        output_type: str,
        tensor_inputs: Sequence[str],
        prompt: str | None,
        negative_prompt: str | None,
        options: Mapping[str, Any],
    ) -> None:
        """Raise UsageError for arguments that cannot be followed."""
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type is {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        if unknown := [name for name in tensor_inputs if name not in TENSOR_INPUTS]:
            raise UsageError(
                f"callback_on_step_end_tensor_inputs has {unknown[0]!r}, expected some of "
                f"{', '.join(TENSOR_INPUTS)}"
            )
        for name, known in {"steps": "num_inference_steps", "seed": "generator"}.items():
            if name in options:
                raise UsageError(f"{name} is called {known} here; pass {known}=..")
        manifest = self.upscaler.manifest
        given = {"prompt": prompt, "negative_prompt": negative_prompt}
        for (name, text), own in zip(given.items(), (*manifest.prompts, "", ""), strict=False):
            if text and text != own:
                raise UsageError(
                    f"{name} is {text!r}, but the prompts of {manifest.name} were fixed at its export "
                    f"({own!r}); leave {name} out, or export the engine with --{name.replace('_', '-')}"
                )

    def _step_end(self, step: SamplingStep, callback: StepEnd | None, wanted: tuple[str, ...]) -> None:
        """Call a callback, and take over what it changed."""
        self._step, self._num_timesteps = step, step.steps
        if callback and not self._interrupt:
            torch = sys.modules.get("torch")
            latents: Any = step.latents[None]
            given = {"latents": torch.from_numpy(latents) if torch else latents} if wanted else {}
            t = int(step.t) if float(step.t).is_integer() else step.t
            changed = (callback(self, step.step, t, given) or {}).get("latents")
            if changed is not None:
                step.latents = _host(changed).reshape(step.clean.shape)
        if self._interrupt:
            step.latents, step.stopped = step.clean, True


def _torch() -> Any:
    """Import PyTorch, or raise UsageError."""
    try:
        return importlib.import_module("torch")  # only for callers who ask for tensors
    except ImportError:
        raise UsageError('output_type is "pt", which needs PyTorch; install torch, or choose "np"') from None


def _host(array: Any) -> np.ndarray:
    """Return an array or tensor as a NumPy array."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    return np.asarray(array, np.float32)


def _pictures(image: Any) -> list[Any]:
    """Return PIL images and arrays [H, W, C] for whatever `DiffusersUpscaler` takes."""
    if isinstance(image, (list, tuple)):
        return [picture for one in image for picture in _pictures(one)]
    if isinstance(image, Image.Image):
        return [image]
    planes_first = not isinstance(image, np.ndarray)
    if planes_first and not arrays.is_foreign(image):
        raise InputError(
            f"got {type(image).__name__}, expected a PIL image, a NumPy array, a tensor, or a list of these"
        )
    if planes_first:
        image = image.detach().cpu().numpy() if hasattr(image, "detach") else arrays.to_host(image)
    if image.ndim == 4:
        return [picture for one in image for picture in _single(one, planes_first)]
    return _single(image, planes_first)


def _single(image: np.ndarray, planes_first: bool) -> list[Any]:
    """Return one array, [C, H, W] if `planes_first`, as [H, W, C]."""
    if planes_first and image.ndim == 3:
        image = image.transpose(1, 2, 0)
    if image.dtype == np.float64:
        image = image.astype(np.float32)
    return [np.ascontiguousarray(image)]


def _seeds(generator: Any, count: int) -> tuple[int, ...]:
    """Return the seeds of `count` images; UsageError if there are not as many generators."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != count:
            raise UsageError(
                f"there are {len(generator)} generators for {count} images; pass one, or one per image"
            )
        return tuple(_seeds(one, 1)[0] for one in generator)
    if generator is None:
        generator = np.random.default_rng()
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        first = check_seed(int(generator))
        return tuple((first + k) % (MAX_SEED + 1) for k in range(count))
    return tuple(_drawn(generator) for _ in range(count))


def _drawn(generator: Any) -> int:
    """Draw a seed from a generator of NumPy or PyTorch."""
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(0, 2**63))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(generator, torch.Generator):
        return int(torch.randint(0, 2**63 - 1, (), generator=generator, device=generator.device))
    raise UsageError(
        f"generator is a {type(generator).__name__}, expected an integer, a torch.Generator, a "
        "numpy.random.Generator, or a list of them"
    )


def _as_output(results: list[Any], output_type: str, torch: Any) -> Any:
    """Return results, PIL images or arrays [H, W, C], in the type that was asked for."""
    if output_type == "pil":
        return [one if isinstance(one, Image.Image) else _as_pil(one) for one in results]
    planes = [_as_floats(np.asarray(one)) for one in results]
    alike = len({one.shape for one in planes}) == 1
    if torch is None:
        return np.stack(planes) if alike else planes
    tensors = [torch.from_numpy(np.ascontiguousarray(one.transpose(2, 0, 1))) for one in planes]
    return torch.stack(tensors) if alike else tensors


def _as_floats(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as float32 [H, W, C] from 0 to 1."""
    if pixels.dtype.kind == "f":
        floats = pixels.astype(np.float32)
    else:
        floats = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    return floats[..., None] if floats.ndim == 2 else floats


def _as_pil(pixels: np.ndarray) -> Image.Image:
    """Return pixels as a PIL image of 8 bits per channel."""
    bytes_ = np.rint(_as_floats(pixels) * 255).astype(np.uint8)
    return Image.fromarray(bytes_[..., 0] if bytes_.shape[2] == 1 else bytes_)
