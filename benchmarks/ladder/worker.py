"""One candidate of the latency benchmark in a process of its own, so that its peak memory is its own.

The argument is one JSON object with the fields of `Task`. The ways "profile", "whole" and "open" print their
result and end. The other ways load their networks, print how long that took, and then answer commands from
stdin: "step", "shallow", "decode", and "save FILE", which writes the results of step and decode. Each answer
is a JSON line with seconds and peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ladder import profiles
from moesr.runtime.backends.selection import Backend, candidates
from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.engine.manifest_file import read_manifest

EXPERT = "expert_0"

Run = Callable[[], object]
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Candidate:
    """The functions that a rung runs, and access to their results."""

    step: Run
    decode: Run
    outputs: Callable[[], tuple[np.ndarray, np.ndarray]]  # results of the last step and decode
    shallow: Run | None = None


@dataclass(frozen=True)
class Task:
    """The task of the process; `given` is a file with the inputs of expert and decoder by name."""

    way: str
    directory: str
    threads: int
    given: str = ""
    backend: str = "onnxruntime"
    precision: str = "graph"
    cache: str | None = None
    reuse: int = 1
    steps: int = 2
    begun: float = 0.0  # start of the process, in seconds of the system's clock
    options: dict[str, Any] = field(default_factory=dict)  # options of an Upscaler's call

    def inputs(self, names: tuple[str, ...]) -> Inputs:
        """Read the inputs with these names, in this order."""
        with np.load(self.given) as arrays:
            return {name: arrays[name] for name in names}


OF_EXPERT, OF_DECODER = ("z_t", "cond", "t"), ("z", "lr", "fidelity")


def select(task: Task) -> Backend:
    """Return the backend with the settings of the task."""
    cache = Path(task.cache) if task.cache else None
    return candidates(task.backend, "cpu", task.threads, precision=task.precision, cache=cache)[0]


def engine(task: Task) -> Candidate:
    """Load the runtime's step and decode; with reuse, also the step without the deep levels."""
    directory = Path(task.directory)
    manifest, backend = read_manifest(directory, verify=False), select(task)
    buffers: dict[str, np.ndarray] = dict(task.inputs((*OF_EXPERT, *OF_DECODER)))
    step, eps = _bound(backend, directory, manifest.graphs[EXPERT], buffers)
    shallow = getattr(manifest.experts[0], "shallow", None) if task.reuse > 1 else None
    again = _bound(backend, directory, manifest.graphs[shallow], buffers)[0] if shallow else None
    decode, image = _bound(backend, directory, manifest.graphs[DECODER], buffers)
    return Candidate(step, decode, lambda: (eps, image), again)


def _bound(
    backend: Backend, directory: Path, graph: Graph, buffers: dict[str, np.ndarray]
) -> tuple[Run, np.ndarray]:
    """Bind a graph to named buffers and allocate missing ones; returns its run and its first output."""
    session = backend.open(directory, graph)
    for spec in (*session.boundary.inputs, *session.boundary.outputs):
        if spec.name not in buffers:
            buffers[spec.name] = backend.device().buffer(spec, 1)
    mine = buffers | {
        session.boundary.outputs[0].name: np.zeros(session.boundary.outputs[0].shape(1), np.float32)
    }
    session.bind(mine, 1)
    return lambda: session.enqueue(1), mine[session.boundary.outputs[0].name]


def plain(task: Task) -> Candidate:
    """Load the graphs in ONNX Runtime with default options and without bound buffers."""
    import onnxruntime as ort

    directory, results = Path(task.directory), {}
    manifest = read_manifest(directory, verify=False)

    def run(role: str, names: tuple[str, ...]) -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = task.threads, 3
        path = str(directory / manifest.graphs[role].file)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        feed = {k: v for k, v in task.inputs(names).items() if k in wanted}
        return lambda: results.update({role: session.run(None, feed)[0]})

    step, decode = run(EXPERT, OF_EXPERT), run(DECODER, OF_DECODER)
    return Candidate(step, decode, lambda: (results[EXPERT], results[DECODER]))


def pytorch(task: Task) -> Candidate:
    """Load the networks of the checkpoint in PyTorch: eager, compiled, or in bf16 and channels last."""
    import torch

    from moesr.training.checkpoint import load_checkpoint

    torch.set_num_threads(task.threads)
    checkpoint, results = load_checkpoint(Path(task.directory)), {}
    expert, autoencoder = checkpoint.expert(0), checkpoint.decoder()
    layout: Any = torch.channels_last if task.way == "autocast" else torch.contiguous_format
    decode: Callable[..., Any] = autoencoder.decode

    def call(role: str, function: Callable[..., Any], names: tuple[str, ...]) -> Run:
        tensors = [torch.from_numpy(value) for value in task.inputs(names).values()]
        tensors = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in tensors]
        if role == DECODER and tensors[-1].dim() == 1:  # fidelity, one per tile
            tensors[-1] = tensors[-1][:, None, None, None]

        @torch.inference_mode()
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=task.way == "autocast"):
                results[role] = function(*tensors)

        return run

    if task.way == "autocast":
        for module in (expert, autoencoder):
            module.to(memory_format=layout)  # type: ignore[call-overload]
    if task.way == "compiled":
        expert, decode = torch.compile(expert), torch.compile(decode)
    runs = call(EXPERT, expert, OF_EXPERT), call(DECODER, decode, OF_DECODER)
    return Candidate(*runs, lambda: tuple(results[r].float().numpy() for r in (EXPERT, DECODER)))


WAYS: dict[str, Callable[[Task], Candidate]] = {
    "engine": engine,
    "plain": plain,
    "eager": pytorch,
    "compiled": pytorch,
    "autocast": pytorch,
}


def whole(task: Task) -> dict[str, float]:
    """Make a whole image of one tile: returns the seconds since the process's start, and peak memory."""
    from moesr.runtime import Upscaler

    side = read_manifest(Path(task.directory), verify=False)
    lr = np.random.default_rng(0).integers(0, 256, (side.tile // side.scale,) * 2 + (3,), np.uint8)
    options = {"backend": task.backend, "precision": task.precision, "cache": task.cache}
    with Upscaler(task.directory, threads=task.threads, **options) as up:
        opened = time.time() - task.begun
        up(lr, steps=task.steps, **task.options)
    return {"opened": opened, "seconds": time.time() - task.begun, "peak_bytes": peak_bytes()}


def open_all(task: Task) -> dict[str, float]:
    """Open all graphs one after the other, which fills the cache; returns the seconds."""
    directory, begin = Path(task.directory), time.perf_counter()
    manifest, backend = read_manifest(directory, verify=False), select(task)
    for graph in manifest.graphs.values():
        backend.open(directory, graph).close()
    return {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}


def profile(task: Task) -> dict[str, profiles.Profile]:
    """Profile one step and one decode."""
    directory, found = Path(task.directory), {}
    manifest = read_manifest(directory, verify=False)
    for role, names in ((EXPERT, OF_EXPERT), (DECODER, OF_DECODER)):
        path, values = directory / manifest.graphs[role].file, task.inputs(names)
        if task.backend == "openvino":
            found[role] = profiles.openvino_profile(path, values, select(task).options)
        else:
            found[role] = profiles.onnxruntime_profile(path, values, task.threads)
    return found


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return the peak memory of this process. On Linux, ru_maxrss would include the parent's peak."""
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(
    step: Run, decode: Run, shallow: Run | None = None, save: Callable[[str], object] | None = None
) -> None:
    """Answer commands until stdin ends."""
    commands: Mapping[str, Run | None] = {"step": step, "decode": decode, "shallow": shallow}
    for line in sys.stdin:
        name, _, argument = line.strip().partition(" ")
        begin = time.perf_counter()
        if name == "save":
            assert save, "this candidate saves no results"
            save(argument)
        else:
            run = commands[name]
            assert run, f"there is no {name}"
            run()
        answer = {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}
        print(json.dumps(answer), flush=True)


ENDING: dict[str, Callable[[Task], object]] = {"profile": profile, "whole": whole, "open": open_all}


def main(argument: str) -> None:
    """Do the task: print its result, or load the candidate, print the load time, and answer commands."""
    task, begin = Task(**json.loads(argument)), time.perf_counter()
    if task.way in ENDING:
        print(json.dumps(ENDING[task.way](task)))
        return
    made = WAYS[task.way](task)
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}), flush=True)
    serve(made.step, made.decode, made.shallow, lambda path: np.savez(path, *made.outputs()))


if __name__ == "__main__":
    main(sys.argv[1])
