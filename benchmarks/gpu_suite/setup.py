"""What benchmarks/gpu.py measures: sizes, inputs, and the small things that its sections share."""

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
"""Relative L2 error that half precision may have of float32, over a whole network."""

CACHE = Path(tempfile.gettempdir()) / "moesr-gpu"

TIMED_S = 0.3
"""Seconds of runs that a figure is taken from, back to back."""


class Absent(Exception):
    """A part of the stack that a section needs is not here; the text says which."""


@dataclass(frozen=True)
class Row:
    """One measured value. `share` is of the limit that `limit` names: 0 to 1."""

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
    seconds: float = 60.0  # that the section may take

    @property
    def engine(self) -> Path:
        """The engine directory that sections share."""
        return self.cache / f"engine-{self.width}-{self.channels}-{self.tile}"

    def exported(self, backend: str) -> Path:
        """The engine directory of the graphs exported for a backend."""
        return self.cache / f"exported-{backend}-{self.width}-{self.channels}-{self.tile}"

    @property
    def limits(self) -> Path:
        """Rates of this GPU, measured."""
        return self.cache / "limits.json"

    @property
    def reference(self) -> Path:
        """What the networks give on the host in float32."""
        return self.cache / f"reference-{self.width}-{self.channels}-{self.tile}.npz"

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setup:
        """From the command line."""
        lists = {name: tuple(getattr(args, name)) for name in ("steps", "batches")}
        return cls(args.width, args.channels, args.tile, **lists, cache=args.cache, seconds=args.seconds)

    @property
    def arguments(self) -> list[str]:
        """The command line of a section's process."""
        names = "width", "channels", "tile", "cache", "seconds"
        found = [part for name in names for part in (f"--{name}", str(getattr(self, name)))]
        for name in ("steps", "batches"):
            found += [f"--{name}", *map(str, getattr(self, name))]
        return found


@dataclass
class Report:
    """What a section says while it runs, a line at once, so that nothing is lost when it is ended."""

    say: Callable[[str, Any], None]
    setup: Setup
    began: float = field(default_factory=time.monotonic)

    def row(self, who: str, what: str, value: float, unit: str, batch: int = 1, **more: Any) -> None:
        """A measured value."""
        self.say("row", Row(who, what, value, unit, batch, **more).__dict__)

    def check(self, what: str, error: float, tolerance: float) -> bool:
        """A comparison; whether it held."""
        held = bool(error <= tolerance)  # NaN does not hold
        self.say("check", {"what": what, "error": error, "tolerance": tolerance, "held": held})
        return held

    def note(self, text: str) -> None:
        """Anything else to be known."""
        self.say("note", text)

    @property
    def left(self) -> float:
        """Seconds until this section is ended."""
        return self.setup.seconds - (time.monotonic() - self.began)


def rates(setup: Setup) -> dict[str, float]:
    """Measured limits of this GPU: "bytes_per_s" and "flops_per_s"; empty where none were measured."""
    try:
        return json.loads(setup.limits.read_text())
    except (OSError, ValueError):
        return {}


def of_matrix_rate(setup: Setup, macs: float, seconds: float) -> dict[str, Any]:
    """The share of the matrix rate that so many multiply-accumulates in that time are."""
    limit = rates(setup).get("flops_per_s")
    return {"share": 2 * macs / seconds / limit, "limit": "matrix rate"} if limit and macs else {}


def inputs(tile: int, factor: int = 4) -> dict[str, Array]:
    """A tile's inputs: `z` float32 [3, h, w] noise, `cond` uint8 [h, w, 3], `lr` uint8 [H, W, 3]."""
    from moesr.runtime.sampling import noise

    rng, side = np.random.default_rng(SEED), tile // factor
    coarse = rng.integers(0, 256, (side, side, 3), np.uint8)
    z = noise.gaussian(SEED, noise.INITIAL_NOISE, (3, side, side))
    return {"z": z, "cond": coarse, "lr": coarse.repeat(factor, 0).repeat(factor, 1)}


def seconds_each(run: Callable[[], object], sync: Sync, at_least: float = TIMED_S) -> float:
    """Seconds of a run among many that follow each other without waiting; the first three do not count."""
    for _ in range(3):  # the library prepares itself, then a graph is captured, then it is replayed
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
    """The options that `Setup` is made of."""
    add = parser.add_argument
    add("--width", type=int, default=160, help="width of the UNet (default: 160, as published)")
    add("--channels", type=int, default=128, help="channels of the decoder (default: 128, as published)")
    add("--tile", type=int, default=512, metavar="PX", help="side of the image made (default: 512)")
    add("--steps", type=int, nargs="+", default=[20, 50, 200], help="of an image (default: 20 50 200)")
    add("--batches", type=int, nargs="+", default=[1, 4, 16], help="images at once (default: 1 4 16)")
    add(
        "--cache", type=Path, default=CACHE, metavar="DIR", help="for what is prepared (default: %(default)s)"
    )
    add("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)


def absent_unless_there(*modules: str) -> None:
    """Absent naming the first of some modules that is not installed."""
    for module in modules:
        with suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module):
                continue
        raise Absent(f"{module} is not installed")


def describe(setup: Setup, report: Report) -> None:
    """Name, capability, driver and memory of the GPU, and the packages that are here."""
    from benchlib.machine import machine_line

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    report.say("facts", {"host": machine_line(), "packages": versions})
    report.say("facts", gpu_facts())


def gpu_facts() -> dict[str, Any]:
    """Of the driver by cuda.core, or else by PyTorch; Absent where neither sees a GPU."""
    from moesr.runtime.devices import cuda_driver
    from moesr.runtime.errors import EngineError

    try:
        device = cuda_driver.open_device(0)
        capability = ".".join(map(str, device.compute_capability))
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
