"""Sizes and inputs of benchmarks/gpu.py, the report of a section, and functions that sections share."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
Sync = Callable[[], object]

PACKAGES = (
    "torch", "triton", "numpy", "cuda-core", "cuda-bindings", "onnx", "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt_rtx_cu13_bindings",
)  # fmt: skip

SEED = 7
T = 500
"""Timestep of the step that is checked and timed."""

TOLERANCE = 3e-2
"""Largest relative L2 error of a whole network in half precision against float32."""

CACHE = Path(tempfile.gettempdir()) / "moesr-gpu"

TIMED_S = 0.3
"""Seconds of back-to-back runs per measurement."""


class Absent(Exception):
    """Raised if something that a section needs is not installed; the message names it."""


@dataclass(frozen=True)
class Row:
    """One measured value. `share` (0 to 1) is its fraction of the limit called `limit`."""

    who: str  # what ran it
    what: str  # "step", "decode", "image of 20 steps", ..
    value: float
    unit: str
    batch: int = 1
    share: float | None = None
    limit: str = ""


@dataclass(frozen=True)
class Setup:
    """Sizes of the networks and of the measurement."""

    width: int = 160
    channels: int = 128
    tile: int = 512
    steps: tuple[int, ...] = (20, 50, 200)
    batches: tuple[int, ...] = (1, 4, 16)
    cache: Path = Path("gpu-cache")
    kernels: Path | None = None  # prebuilt kernels, or None to compile them
    seconds: float = 60.0  # time limit of the section

    @property
    def engine(self) -> Path:
        """The stand-in engine directory that sections share."""
        return self.cache / f"engine-{self.width}-{self.channels}-{self.tile}"

    @property
    def compiled(self) -> Path:
        """The directory of all kernels, compiled for this GPU."""
        return self.cache / "kernels"

    def exported(self, backend: str) -> Path:
        """Return the engine directory of the graphs exported for a backend."""
        return self.cache / f"exported-{backend}-{self.width}-{self.channels}-{self.tile}"

    @property
    def limits(self) -> Path:
        """The file of this GPU's measured rates."""
        return self.cache / "limits.json"

    @property
    def reference(self) -> Path:
        """The file of the networks' float32 results on the host."""
        return self.cache / f"reference-{self.width}-{self.channels}-{self.tile}.npz"

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setup:
        """Build the setup from the parsed command line."""
        lists = {name: tuple(getattr(args, name)) for name in ("steps", "batches")}
        more = {"cache": args.cache, "kernels": args.kernels, "seconds": args.seconds}
        return cls(args.width, args.channels, args.tile, **lists, **more)

    @property
    def arguments(self) -> list[str]:
        """Return the command-line arguments of a section's process."""
        names = "width", "channels", "tile", "cache", "seconds"
        found = [part for name in names for part in (f"--{name}", str(getattr(self, name)))]
        found += ["--kernels", str(self.kernels)] if self.kernels else []
        for name in ("steps", "batches"):
            found += [f"--{name}", *map(str, getattr(self, name))]
        return found


@dataclass
class Report:
    """Reports results of a section line by line, so that none is lost if its process is ended."""

    say: Callable[[str, Any], None]
    setup: Setup
    began: float = field(default_factory=time.monotonic)

    def row(self, who: str, what: str, value: float, unit: str, batch: int = 1, **more: Any) -> None:
        """Report a measured value."""
        self.say("row", Row(who, what, value, unit, batch, **more).__dict__)

    def check(self, what: str, error: float, tolerance: float) -> bool:
        """Report a comparison; returns True if the error is within the tolerance."""
        held = bool(error <= tolerance)  # False for NaN
        self.say("check", {"what": what, "error": error, "tolerance": tolerance, "held": held})
        return held

    def note(self, text: str) -> None:
        """Report a note for the page."""
        self.say("note", text)

    @property
    def left(self) -> float:
        """Return the seconds until the time limit of this section."""
        return self.setup.seconds - (time.monotonic() - self.began)


def rates(setup: Setup) -> dict[str, float]:
    """Read this GPU's measured "bytes_per_s" and "flops_per_s"; empty if they were not measured."""
    try:
        return json.loads(setup.limits.read_text())
    except (OSError, ValueError):
        return {}


def of_matrix_rate(setup: Setup, macs: float, seconds: float) -> dict[str, Any]:
    """Return the fraction of the matrix rate that `macs` multiply-accumulates in `seconds` reach."""
    limit = rates(setup).get("flops_per_s")
    return {"share": 2 * macs / seconds / limit, "limit": "matrix rate"} if limit and macs else {}


def inputs(tile: int, factor: int = 4) -> dict[str, Array]:
    """Return a tile's inputs: noise `z` float32 [3, h, w], `cond` uint8 [h, w, 3], `lr` uint8 [H, W, 3]."""
    from moesr.runtime.sampling import noise

    rng, side = np.random.default_rng(SEED), tile // factor
    coarse = rng.integers(0, 256, (side, side, 3), np.uint8)
    z = noise.gaussian(SEED, noise.INITIAL_NOISE, (3, side, side))
    return {"z": z, "cond": coarse, "lr": coarse.repeat(factor, 0).repeat(factor, 1)}


def seconds_each(run: Callable[[], object], sync: Sync, at_least: float = TIMED_S) -> float:
    """Return the mean seconds of back-to-back runs without waiting in between, after three warm-up runs."""
    for _ in range(3):  # first a warm-up, then the capture of a graph, then its first replay
        run()
    sync()
    start = time.perf_counter()
    run()
    sync()
    count = max(1, min(1000, round(at_least / max(time.perf_counter() - start, 1e-6))))
    start = time.perf_counter()
    for _ in range(count):
        run()
    sync()
    return (time.perf_counter() - start) / count


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that `Setup.of` reads."""
    add = parser.add_argument
    add("--width", type=int, default=160, help="width of the UNet (default: 160, as published)")
    add("--channels", type=int, default=128, help="channels of the decoder (default: 128, as published)")
    add("--tile", type=int, default=512, metavar="PX", help="side of the output image (default: 512)")
    add("--steps", type=int, nargs="+", default=[20, 50, 200], help="sampling steps (default: 20 50 200)")
    add("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes (default: 1 4 16)")
    add(
        "--cache",
        type=Path,
        default=CACHE,
        metavar="DIR",
        help="folder for prepared files (default: %(default)s)",
    )
    add("--kernels", type=Path, metavar="DIR", help="prebuilt kernels (default: they are compiled)")
    add("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)


def absent_unless_there(*modules: str) -> None:
    """Raise Absent naming the first of these modules that is not installed."""
    for module in modules:
        with suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module):
                continue
        raise Absent(f"{module} is not installed")


def describe(setup: Setup, report: Report) -> None:
    """Report name, capability, driver and memory of the GPU, and the installed packages."""
    from benchlib.machine import machine_line

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    report.say("facts", {"host": machine_line(), "packages": versions})
    report.say("facts", gpu_facts())


def gpu_facts() -> dict[str, Any]:
    """Return facts of the GPU from cuda.core, or else from PyTorch; raises Absent if neither sees a GPU."""
    from moesr.runtime.backends.tensorrt.plan_builder import as_text
    from moesr.runtime.devices import cuda_driver
    from moesr.runtime.errors import EngineError

    try:
        device = cuda_driver.open_device(0)
        capability = as_text(cuda_driver.device_capability(device))
        driver, total = cuda_driver.driver_version(), cuda_driver.memory_bytes()[1]
        return {"gpu": str(device.name), "capability": capability, "cuda": driver, "memory_gb": total / 1e9}
    except EngineError as error:
        reason = str(error)
    try:
        import torch
    except ImportError as error:
        raise Absent(f"{reason}; {error}") from error
    if not torch.cuda.is_available():
        raise Absent(f"{reason}; PyTorch {torch.__version__} sees none")
    seen = torch.cuda.get_device_properties(0)
    capability = f"{seen.major}.{seen.minor}"
    facts = {"gpu": seen.name, "capability": capability, "cuda": str(torch.version.cuda)}
    return facts | {"memory_gb": seen.total_memory / 1e9, "note": reason}
