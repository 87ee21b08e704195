"""One candidate of the latency benchmark in a process of its own, so that its peak memory is its own.

Reads commands from stdin ("step", "decode", "image N"); answers each with a JSON line: seconds, peak memory.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.backends import select_backend
from moesr.runtime.manifest import Manifest
from moesr.runtime.sessions.ort import session_options

ROLES = ("expert_0", "decoder")

Run = Callable[[], object]
Inputs = dict[str, np.ndarray]


def inputs(tile_px: int, factor: int) -> tuple[Inputs, Inputs]:
    """Seeded inputs of the expert and of the decoder, one tile."""
    rng, side = np.random.Generator(np.random.PCG64(0)), tile_px // factor
    z_t, cond = rng.standard_normal((2, 1, 3, side, side), np.float32)
    lr = rng.uniform(-1, 1, (1, 3, tile_px, tile_px)).astype(np.float32)
    return {"z_t": z_t, "cond": cond, "t": np.array([500], np.float32)}, {
        "z": z_t,
        "lr": lr,
        "fidelity": np.ones(1, np.float32),
    }


def engine(directory: Path, threads: int) -> tuple[Run, Run]:
    """Step and decode as the runtime does them."""
    manifest = Manifest.read(directory)
    backend = select_backend("onnxruntime", "cpu", threads)
    device = backend.device()
    runs: list[Run] = []
    for role, values in zip(ROLES, inputs(manifest.tile, manifest.latent_factor), strict=True):
        session = backend.open(directory, manifest.graphs[role])
        specs = (*session.boundary.inputs, *session.boundary.outputs)
        buffers = {spec.name: device.buffer(spec, 1) for spec in specs}
        for spec in session.boundary.inputs:
            buffers[spec.name][...] = values[spec.name]
        session.bind(buffers, 1)
        runs.append(lambda session=session: session.enqueue(1))
    return runs[0], runs[1]


def eager(directory: Path, threads: int, tile_px: int) -> tuple[Run, Run]:
    """The same networks in eager PyTorch, from the checkpoint."""
    import torch

    from moesr.training.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(directory)
    of_expert, of_decoder = inputs(tile_px, checkpoint.config.decoder.factor)
    expert, autoencoder = checkpoint.expert(0), checkpoint.decoder()

    def call(function: Callable[..., Any], values: Inputs) -> Run:
        tensors = [torch.from_numpy(value) for value in values.values()]

        @torch.inference_mode()
        def run() -> object:
            return function(*tensors)

        return run

    return call(expert, of_expert), call(autoencoder.decode, of_decoder)


def profile(directory: Path, threads: int) -> dict[str, dict[str, dict[str, float]]]:
    """Where one step and one decode spend their time: milliseconds by module and by operator, second run."""
    manifest, found = Manifest.read(directory), {}
    for role, values in zip(ROLES, inputs(manifest.tile, manifest.latent_factor), strict=True):
        found[role] = profile_graph(directory / manifest.graphs[role].file, values, threads)
    return found


def profile_graph(path: Path, values: Inputs, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one run of a graph by module and by operator, as ONNX Runtime's profiler sees them."""
    import onnxruntime as ort

    options = session_options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = f"{scratch}/profile"
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        for _ in range(2):
            session.run(None, {k: v for k, v in values.items() if k in wanted})
        events = json.loads(Path(session.end_profiling()).read_text())
    second = max(e["ts"] for e in events if e["name"] == "model_run")
    modules: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["ts"] >= second and event["name"].endswith("_kernel_time"):
            operators[event["args"]["op_name"]] += event["dur"] / 1000
            scope = re.split(r"/?[A-Z]\w*_\d+", event["name"])[0]  # without the node's own name
            # nodes that the optimiser adds, such as layout changes, have none
            modules["/".join(scope.split("/")[:2]) or "layout changes"] += event["dur"] / 1000
    return {"modules": dict(modules.most_common()), "operators": dict(operators.most_common())}


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Largest memory this process has held; on Linux not ru_maxrss, which begins with that of the parent."""
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(step: Run, decode: Run) -> None:
    """Answer commands until stdin ends."""
    commands: Mapping[str, Run] = {"step": step, "decode": decode}
    for line in sys.stdin:
        name, *count = line.split()
        begin = time.perf_counter()
        for _ in range(int(count[0]) if count else 0):
            step()
        commands["decode" if name == "image" else name]()
        answer = {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}
        print(json.dumps(answer), flush=True)


def main(kind: str, directory: str, threads: str, tile_px: str) -> None:
    """Load the candidate, say how long that took, then serve; "profile" prints its result and ends."""
    path, begin = Path(directory), time.perf_counter()
    if kind == "profile":
        print(json.dumps(profile(path, int(threads))))
        return
    step, decode = engine(path, int(threads)) if kind == "engine" else eager(path, int(threads), int(tile_px))
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}), flush=True)
    serve(step, decode)


if __name__ == "__main__":
    main(*sys.argv[1:])
