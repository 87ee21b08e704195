"""The processes of a latency benchmark, and the rounds in which they run one after the other."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from ladder import report
from ladder.configurations import EAGER, Rung, export
from moesr.export.package import checkpoint_directory
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, read_manifest
from moesr.runtime.errors import MoesrError
from moesr.runtime.system.relative_error import relative_l2
from moesr.training.checkpoint import Checkpoint, load_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[1]
GIGA = 1e9


@dataclass(frozen=True)
class Row:
    """One quantity, measured for the engine and for eager PyTorch."""

    what: str
    unit: str
    engine: float
    eager: float

    @property
    def ratio(self) -> float:
        """Eager over engine; above 1 the engine is better."""
        return self.eager / self.engine


@dataclass
class Measured:
    """Measurements of a rung: the seconds of each kind of run, in order, and further values by name."""

    rung: Rung
    seconds: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    def image(self, steps: int) -> float:
        """Return the seconds of an image of `steps` steps, composed from medians."""
        step, decode = self.median("step"), self.median("decode")
        full = self.rung.full(steps)
        return full * step + (steps - full) * self.median("shallow", step) + decode

    def median(self, what: str, otherwise: float = 0.0) -> float:
        """Return the median seconds of the runs called `what`, or `otherwise` if there are none."""
        return median(self.seconds[what]) if what in self.seconds else otherwise

    def to_json(self) -> dict[str, Any]:
        """Return the measurements and the values derived from them."""
        firsts = self.values["first step"] + self.values["first decode"]
        rest = self.image(self.rung.steps) - self.median("step") - self.median("decode")
        found = {w: self.median(w) for w in ("step", "shallow", "decode") if w in self.seconds}
        found |= {
            "image": self.image(self.rung.steps),
            "image 20": self.image(20),
            "image 50": self.image(50),
        }
        return asdict(self.rung) | self.values | found | {"first image": self.values["load"] + firsts + rest}


class Worker:
    """The process of a candidate."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.loaded: float = self._answer()["seconds"]

    def ask(self, command: str) -> dict[str, float]:
        """Send a command to the process and return its answer."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # the process has ended; `_answer` reports it
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise MoesrError(f"its process ended with code {self._process.wait()}; see its message above")
        return json.loads(line)


@contextmanager
def _worker(task: dict[str, Any]) -> Iterator[Worker]:
    with subprocess.Popen(
        _command(task), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        try:
            yield Worker(process)
        finally:
            assert process.stdin
            with suppress(BrokenPipeError):
                process.stdin.close()


def _environment() -> dict[str, str]:
    """Return the environment of a worker, with the benchmarks' packages on PYTHONPATH."""
    found = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))}


def _command(task: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "ladder.worker", json.dumps(task)]


class Bench:
    """The work directory of the benchmark and the measurements made in it."""

    def __init__(self, place: Path, given: Path, args: argparse.Namespace, bar: tqdm) -> None:
        self._place, self._given, self._args, self._bar = place, given, args, bar
        self.failed: dict[str, str] = {}  # reasons by rung
        self.macs: dict[str, dict[str, int]] = {}  # by engine and role
        self.parity: dict[str, dict[str, float]] = {}

    def stage(self, what: str) -> None:
        """Show the current stage in the progress bar."""
        self._bar.set_description(what)
        self._bar.update()

    def export_all(self, checkpoint: Checkpoint, chosen: Sequence[Rung]) -> dict[str, str]:
        """Export the engines of the rungs and the plain one; returns the reasons of failures by rung."""
        reasons: dict[str, str] = {}
        for name in dict.fromkeys(["plain", *(rung.engine for rung in chosen if rung.engine)]):
            self.stage(f"export and prove {name}")
            directory = self._engine(name)
            if not (directory / MANIFEST_NAME).is_file():
                why = export(name, checkpoint, directory, self._args.tile)
                if why:
                    reasons |= {rung.name: why for rung in chosen if rung.engine == name}
                    continue
            graphs = read_manifest(directory, verify=False).graphs
            self.macs[name] = {role: graph.macs for role, graph in graphs.items()}
            self.parity[name] = {r: g.parity.relative_l2 for r, g in graphs.items() if g.parity}
        return reasons

    def time_all(self, rungs: Sequence[Rung]) -> list[Measured]:
        """Time the rungs in rounds, one process at a time, since memory holds only few of them.

        Rungs whose process fails are left out. Raises MoesrError if eager PyTorch fails.
        """
        found = {rung.name: Measured(rung) for rung in rungs}
        for repeat in range(self._args.repeats):
            for one in list(found.values()):
                self.stage(f"round {repeat + 1} of {self._args.repeats}: {one.rung.name}")
                try:
                    self._turn(one)
                except MoesrError as error:
                    if one.rung is EAGER:
                        raise
                    self.failed[one.rung.name] = str(error)
                    del found[one.rung.name]
        return list(found.values())

    def _turn(self, one: Measured) -> None:
        """Run everything once, then time three steps and a decode."""
        rung, output = one.rung, self._place / "output.npz"
        if rung.way == "engine" and "first load" not in one.values:  # optimizes and caches its graphs
            one.values["first load"] = self._ended(rung, "open")["seconds"]
        with _worker(self._task(rung, rung.way)) as worker:
            one.values |= {"load": worker.loaded, "first step": worker.ask("step")["seconds"]}
            one.values["first decode"] = worker.ask("decode")["seconds"]
            for what in ("step", "shallow", "step", "shallow", "step", "decode"):
                if what != "shallow" or rung.reuse > 1:
                    one.seconds.setdefault(what, []).append(worker.ask(what)["seconds"])
            one.values["peak_bytes"] = worker.ask(f"save {output}")["peak_bytes"]
        with np.load(output) as arrays:
            outputs = [arrays[name] for name in arrays.files]
        if rung is EAGER:
            self._want = outputs
        errors = (relative_l2(got, want) for got, want in zip(outputs, self._want, strict=True))
        one.values |= dict(zip(("step error", "decode error"), errors, strict=True))

    def find_memory(self, one: Measured) -> None:
        """Measure the peak memory of a whole image, and its time from the start of the process."""
        if one.rung.way != "engine":
            return
        self.stage(f"a whole image: {one.rung.name}")
        answer = self._ended(one.rung, "whole")
        one.values |= {"peak_bytes": answer["peak_bytes"], "opened": answer["opened"]}
        one.values["whole image of 2 steps"] = answer["seconds"]

    def find_quality(self, one: Measured) -> None:
        """Measure the PSNR of the bundled x4 model, exported and run as the rung says."""
        rung = one.rung
        if rung.way != "engine":
            return
        self.stage(f"quality: {rung.name}")
        directory = self._place / f"demo-{rung.engine}"
        checkpoint = load_checkpoint(checkpoint_directory())
        if not (directory / MANIFEST_NAME).is_file() and (
            why := export(rung.engine, checkpoint, directory, checkpoint.config.tile_multiple * 6)
        ):
            print(f"{rung.name}: no quality: {why}", file=sys.stderr)
            return
        one.values["psnr"] = report.quality(directory, rung, self._args.threads)

    def profiles(self, found: Sequence[Measured]) -> dict[str, Any]:
        """Profile our rungs that do not reuse features; returns the profiles by name."""
        where = {}
        for rung in (one.rung for one in found if one.rung.way == "engine" and one.rung.reuse == 1):
            self.stage(f"profile {rung.name}")
            where[rung.name] = self._ended(rung, "profile")
        return where

    def _engine(self, name: str) -> Path:
        return self._place / name

    def _task(self, rung: Rung, way: str) -> dict[str, Any]:
        return {
            "way": way,
            "directory": str(self._engine(rung.engine) if rung.engine else self._place / "checkpoint"),
            "threads": self._args.threads,
            "given": str(self._given),
            "backend": rung.backend,
            "precision": rung.precision,
            "cache": str(self._place / "cache"),
            "reuse": rung.reuse,
            "begun": time.time(),
            "options": report.options(rung),
        }

    def _ended(self, rung: Rung, way: str) -> dict[str, Any]:
        """Return the answer of a process that does one task and ends."""
        done = subprocess.run(
            _command(self._task(rung, way)), stdout=subprocess.PIPE, text=True, env=_environment()
        )
        if done.returncode:
            raise MoesrError(f"its process ended with code {done.returncode}; see its message above")
        return json.loads(done.stdout)
