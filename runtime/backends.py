"""Which backend runs an engine, and on what: chosen once, said aloud, never replaced by another."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.devices import Device
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.errors import EngineError, UsageError
from moesr.runtime.graphs import Graph
from moesr.runtime.options import check_device, check_threads, whole
from moesr.runtime.sessions import Offer, Options, Session

BACKENDS = {"onnxruntime": "moesr.runtime.sessions.ort"}
"""Module of each backend, the preferred one first; "auto" takes the first that loads."""

MAX_BATCH = 256
"""Most tiles in one run that may be asked for."""

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class Backend:
    """A backend that loads, and how to use it."""

    name: str
    options: Options
    max_batch: int  # tiles in one run

    @property
    def target(self) -> str:
        """What graphs should be arranged for: "cpu" or "gpu"."""
        return "cpu" if self.options.kind == "cpu" else "gpu"

    def device(self) -> Device:
        """The device whose buffers its sessions run between."""
        return HostDevice()

    def open(self, directory: Path, graph: Graph) -> Session:
        """Open one graph of an engine; EngineError where the file or the device cannot be used."""
        path = directory / graph.arrangement(self.target).file
        return importlib.import_module(BACKENDS[self.name]).open_session(path, graph.boundary, self.options)

    def release(self) -> None:
        """Give back what the library keeps for further sessions."""
        importlib.import_module(BACKENDS[self.name]).release()


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
    device, threads = check_device(device), check_threads(threads)
    if max_batch is not None:
        whole("max_batch", max_batch, 1, MAX_BATCH)
    failures = []
    for candidate in BACKENDS if name == "auto" else [name]:
        try:
            offer = probe(candidate)
        except EngineError as error:
            failures.append(str(error))
            continue
        names = ", ".join(offer.devices)
        options = Options(device or next(iter(offer.devices)), threads)
        if options.kind in offer.devices:
            why = "asked for" if device else f"the fastest of: {names}"
            log.info("backend %s %s on %s (%s)", candidate, offer.version, options.device, why)
            return Backend(candidate, options, max_batch or offer.devices[options.kind])
        failures.append(
            f"{candidate} {offer.version} cannot use device {options.device!r} here, only {names}"
        )
    raise EngineError("; ".join(failures))
