"""A node for ComfyUI, in its third node interface (`comfy_api.latest`).

The folder `custom_nodes/moesr` of ComfyUI needs a single file, `__init__.py`, with a single line:

    from moesr.runtime.integrations.comfyui import comfy_entrypoint

Engines are looked for in `models/moesr` and in the folders that `extra_model_paths.yaml` gives as `moesr`.
ComfyUI's own modules are imported when it calls `comfy_entrypoint`.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moesr.runtime.engine.locate import DEMO_ENGINES
from moesr.runtime.engine.manifest_file import MANIFEST_NAME
from moesr.runtime.errors import InputError, UsageError
from moesr.runtime.images.color import COLOR_FIXES
from moesr.runtime.options import DEFAULT_COLOR_FIX, DEFAULT_SEED, MAX_SEED
from moesr.runtime.sampling.schedule import MAX_TIMESTEPS
from moesr.runtime.upscaler import SamplingStep, Upscaler

FOLDER = "moesr"
"""The name of the folder of models, and the category of the node."""

ENGINES_OWN = -1.0
"""The fidelity that stands for the engine's own."""

PREVIEW_PX = 512

log = logging.getLogger("moesr")


class EngineCache:
    """The engine that stays open between two runs of the node. Any thread may call its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name: str | None = None
        self._upscaler: Upscaler | None = None

    def take(self, name: str, path: Path | str) -> Upscaler:
        """Return an open engine, which the caller has for itself until it calls `give_back`."""
        with self._lock:
            kept, known, self._upscaler, self._name = self._upscaler, self._name, None, None
        if kept is not None and known == name:
            return kept
        if kept is not None:
            kept.close()
        return Upscaler(path)

    def give_back(self, name: str, upscaler: Upscaler, *, keep: bool) -> None:
        """Keep an engine for the next run, or close it."""
        with self._lock:
            closed, self._upscaler, self._name = self._upscaler, None, None
            if keep:
                self._upscaler, self._name = upscaler, name
        for one in (closed, None if keep else upscaler):
            if one is not None:
                one.close()

    def clear(self) -> None:
        """Close the engine that is kept, and free its memory. An engine at work is not concerned."""
        with self._lock:
            kept, self._upscaler, self._name = self._upscaler, None, None
        if kept is not None:
            kept.close()


CACHE = EngineCache()


def engines(folders: list[str]) -> dict[str, Path | str]:
    """Return all engines by name: the directories in these folders, then the bundled ones."""
    found: dict[str, Path | str] = {}
    for folder in map(Path, folders):
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if (path / MANIFEST_NAME).is_file():
                    found.setdefault(path.name, path)
    return found | {name: name for name in DEMO_ENGINES if name not in found}


def upscale(
    upscaler: Upscaler,
    image: Any,
    on_step: Callable[[SamplingStep], None],
    check: Callable[[], None],
    **options: Any,
) -> Any:
    """Super-resolve a tensor IMAGE, float [B, H, W, C] of 0 to 1, image by image; returns such a tensor.

    `check` is called after every tick, and may raise to end the work.
    """
    if getattr(image, "ndim", 0) != 4:
        raise InputError("the image is expected as a tensor [B, H, W, C], as ComfyUI's nodes give it")
    torch = importlib.import_module("torch")
    results = []
    for at, pixels in enumerate(image):
        array = np.ascontiguousarray(pixels.detach().cpu().float().clamp(0, 1).numpy())

        def step_of(step: SamplingStep, at: int = at) -> None:
            step.image = at
            on_step(step)

        large = upscaler(array, on_step=step_of, progress=lambda *_: check(), **options)
        results.append(torch.from_numpy(large))
    return torch.stack(results)


def _folders() -> list[str]:
    """Return the folders with engines; `models/moesr` is made known to ComfyUI if it is not yet."""
    paths = importlib.import_module("folder_paths")
    default = os.path.join(paths.models_dir, FOLDER)  # noqa: PTH118 - ComfyUI compares strings
    if FOLDER not in paths.folder_names_and_paths or default not in paths.get_folder_paths(FOLDER):
        paths.add_model_folder_path(FOLDER, default)
    return list(paths.get_folder_paths(FOLDER))


def _engine(name: str) -> Path | str:
    """Return the engine of a name; UsageError if it is gone, as from a saved workflow it may be."""
    found = engines(_folders())
    if name not in found:
        raise UsageError(f"no engine {name!r} in models/{FOLDER}; expected one of {', '.join(found)}")
    return found[name]


def _free_with_models(management: Any) -> None:
    """Close the kept engine too when ComfyUI unloads its models; it has no hook of its own for that."""
    unload = management.unload_all_models
    if getattr(unload, "closes_moesr", False):
        return

    def unload_all_models(*arguments: Any, **named: Any) -> Any:
        CACHE.clear()
        return unload(*arguments, **named)

    unload_all_models.closes_moesr = True  # type: ignore[attr-defined]
    management.unload_all_models = unload_all_models


def _inputs(io: Any) -> list[Any]:
    """Return the inputs of the node."""
    return [
        io.Image.Input("image"),
        io.Combo.Input(
            "engine",
            options=list(engines(_folders())),
            tooltip="Engines in models/moesr, made with moesr-export, and the bundled ones",
        ),
        io.Int.Input(
            "steps", default=0, min=0, max=MAX_TIMESTEPS, tooltip="Sampling steps; 0: the engine's own number"
        ),
        io.Float.Input(
            "fidelity",
            default=ENGINES_OWN,
            min=ENGINES_OWN,
            max=1.0,
            step=0.05,
            tooltip="From 0 (free) to 1 (close to the image); below 0: the engine's own",
        ),
        io.Int.Input(
            "seed",
            default=DEFAULT_SEED,
            min=0,
            max=MAX_SEED,
            control_after_generate=True,
            tooltip="Seed of the noise, the same for all images of a batch",
        ),
        io.Combo.Input(
            "color_fix",
            options=list(COLOR_FIXES),
            default=DEFAULT_COLOR_FIX,
            tooltip="Correction towards the colors of the image",
        ),
        io.Boolean.Input(
            "keep_loaded",
            default=False,
            tooltip="Keep the engine in memory for the next run, until ComfyUI unloads its models",
        ),
    ]


def make_node() -> type:
    """Make the class of the node; ComfyUI must be importable."""
    io = importlib.import_module("comfy_api.latest").io
    management = importlib.import_module("comfy.model_management")
    utils = importlib.import_module("comfy.utils")

    class MoesrUpscale(io.ComfyNode):
        """Super-resolution by diffusion with moesr."""

        @classmethod
        def define_schema(cls) -> Any:
            """Describe the node."""
            return io.Schema(
                node_id="MoesrUpscale",
                display_name="Upscale Image (moesr)",
                category="image/upscaling",
                description="Super-resolution by latent diffusion, with an engine of moesr",
                inputs=_inputs(io),
                outputs=[io.Image.Output()],
            )

        @classmethod
        def execute(
            cls,
            image: Any,
            engine: str,
            steps: int,
            fidelity: float,
            seed: int,
            color_fix: str,
            keep_loaded: bool,
        ) -> Any:
            """Run the node."""
            options: dict[str, Any] = {"seed": seed, "color_fix": color_fix}
            options |= {"steps": steps or None, "fidelity": fidelity if fidelity >= 0 else None}
            check = management.throw_exception_if_processing_interrupted
            bar: list[Any] = []

            def on_step(step: SamplingStep) -> None:
                check()
                bar[:] = bar or [utils.ProgressBar(step.steps * len(image))]
                pixels = step.preview()
                shown = None if pixels is None else ("JPEG", Image.fromarray(pixels), PREVIEW_PX)
                bar[0].update_absolute(step.image * step.steps + step.step + 1, preview=shown)

            upscaler = CACHE.take(engine, _engine(engine))
            kept = False
            try:
                if upscaler.backend.options.kind != "cpu":
                    needed = upscaler.forecast(*image.shape[1:3], **options).memory_bytes
                    management.free_memory(needed, management.get_torch_device())
                result = upscale(upscaler, image, on_step, check, **options)
                kept = keep_loaded
            finally:
                CACHE.give_back(engine, upscaler, keep=kept)
            return io.NodeOutput(result)

    return MoesrUpscale


async def comfy_entrypoint() -> Any:
    """Return the extension with the node, as ComfyUI asks for it when it loads custom nodes."""
    latest = importlib.import_module("comfy_api.latest")
    _free_with_models(importlib.import_module("comfy.model_management"))
    node = make_node()

    class MoesrExtension(latest.ComfyExtension):
        """The nodes of moesr."""

        async def get_node_list(self) -> list[type]:
            """Return all nodes."""
            return [node]

    return MoesrExtension()
