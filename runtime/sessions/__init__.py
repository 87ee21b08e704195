"""Sessions: one graph of an engine on one backend, with buffers bound once.

A backend is a module of this package: its `probe` says what it offers, its `open_session` opens a graph.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from moesr.runtime.errors import EngineError, NonFiniteError, UsageError
from moesr.runtime.manifest import Expert, Graph, Manifest

BACKENDS = {"onnxruntime": "moesr.runtime.sessions.onnxruntime"}
"""Module of each backend, the preferred one first; "auto" takes the first that loads."""

log = logging.getLogger("moesr")


class Session(Protocol):
    """A graph ready to run. Not safe for several threads at once: its buffers are shared by all calls."""

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """Buffers to fill before `run`: float32, the batch axis (if any) first, `max_batch` long."""
        ...

    @property
    def max_batch(self) -> int:
        """Most samples in one `run`."""
        ...

    def run(self, batch: int) -> np.ndarray:
        """Run on the first `batch` samples of the inputs: float32 [batch, ...], valid until the next run."""
        ...


@dataclass(frozen=True)
class Shapes:
    """A graph's boundary: the inputs by name and the output. None stands for the batch; all float32."""

    inputs: Mapping[str, tuple[int | None, ...]]
    optional: frozenset[str]  # inputs that a graph may do without
    output: tuple[int | None, ...]


@dataclass(frozen=True)
class Offer:
    """What a backend's library provides on this machine."""

    version: str
    devices: Mapping[str, int]  # the fastest first, each with the tiles it best runs at once


@dataclass(frozen=True)
class Backend:
    """A backend that loads, and how to use it."""

    name: str
    device: str  # "cpu", "cuda" or "cuda:N"
    threads: int | None  # None: the library's own choice
    max_batch: int  # tiles in one run

    def open(self, directory: Path, manifest: Manifest, graph: Graph) -> Session:
        """Open one graph of an engine; EngineError where the file or the device cannot be used."""
        module = importlib.import_module(BACKENDS[self.name])
        shapes = graph_shapes(manifest, graph)
        return module.open_session(directory / graph.file, shapes, self.device, self.threads, self.max_batch)


def graph_shapes(manifest: Manifest, graph: Graph) -> Shapes:
    """The boundary of an expert or of the decoder, from the sizes in the manifest."""
    latent = (None, manifest.latent_channels, manifest.latent_tile, manifest.latent_tile)
    image = (None, 3, manifest.tile, manifest.tile)
    if isinstance(graph, Expert):
        condition = (None, 3, *latent[2:])
        return Shapes({"z_t": latent, "cond": condition, "t": (None,)}, frozenset(), latent)
    # A plain decoder is not conditioned on the LR image.
    return Shapes({"z": latent, "lr": image, "fidelity": (1,)}, frozenset({"lr", "fidelity"}), image)


def probe(name: str) -> Offer:
    """What a backend offers here; EngineError saying what to install where its library does not load."""
    return importlib.import_module(BACKENDS[name]).probe()


def select_backend(
    name: str = "auto", device: str | None = None, threads: int | None = None, max_batch: int | None = None
) -> Backend:
    """Choose a backend and device, and log which and why.

    "auto" takes the first of `BACKENDS` that loads; without `device`, its fastest. A name or device given
    explicitly is used or refused (UsageError, EngineError), never replaced by another.
    """
    if name != "auto" and name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    if device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise UsageError(f"unknown device {device!r}; expected a name such as cpu, cuda or cuda:1")
    for option, value in (("threads", threads), ("max_batch", max_batch)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}, expected at least 1")
    failures = []
    for candidate in BACKENDS if name == "auto" else [name]:
        try:
            offer = probe(candidate)
        except EngineError as error:
            failures.append(str(error))
            continue
        names = ", ".join(offer.devices)
        chosen = device or next(iter(offer.devices))
        kind = chosen.partition(":")[0]
        if kind in offer.devices:
            why = "asked for" if device else f"the fastest of: {names}"
            log.info("backend %s %s on %s (%s)", candidate, offer.version, chosen, why)
            return Backend(candidate, chosen, threads, max_batch or offer.devices[kind])
        failures.append(f"{candidate} {offer.version} cannot use device {chosen!r} here, only {names}")
    raise EngineError("; ".join(failures))


def require_finite(output: np.ndarray, graph: Graph, precision: str) -> None:
    """Raise NonFiniteError where a graph's output has NaN or infinite values."""
    if math.isfinite(float(output.min())) and math.isfinite(float(output.max())):
        return
    cure = (
        "the engine or its weights are damaged: export it again"
        if precision == "fp32"
        else "export the engine in fp32 (moesr-export without --fp16, --bf16 or --int8) and use that"
    )
    raise NonFiniteError(
        f"{graph.file}: NaN or infinite values in its output (precision {precision}); {cure}"
    )
