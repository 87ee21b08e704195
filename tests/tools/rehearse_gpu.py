"""Run benchmarks/gpu.py from start to end without a GPU, each section in its own process and time limit.

    python tests/tools/rehearse_gpu.py --crash device --hang captures -o out --page out/page.md

The simulated driver takes the place of the GPU: networks are tiny and run on the CPU, the kernels that the
package ships run as their NumPy twins, and others are compiled, or run in Triton's interpreter. Sections that
need a library for GPUs report that it is absent. `--crash` and `--hang` make a section end by a signal, or
never. The page tells the seconds of each section; nothing on it is the speed of a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "benchmarks"), str(REPO / "tests/helpers")]

import gpu  # noqa: E402
from benchlib import machine, origin  # noqa: E402
from gpu_suite import setup as gpu_setup  # noqa: E402

NAME = "Rehearsal without a GPU"
FAULTS = "MOESR_REHEARSAL_FAULTS"  # environment variable: sections that crash or hang, as "crash:device"
TINY = ["--width", "16", "--channels", "16", "--tile", "32", "--steps", "2", "--batches", "1", "2"]
COMPILED = ("tile_gather", "tile_blend")
"""Operators that the rehearsal compiles, in float32; one CPU takes minutes for all of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse, or run one section for the rehearsal's own process; returns the benchmark's exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--section" in given:
        section = given[given.index("--section") + 1]
        os.environ["TRITON_INTERPRET"] = "1"  # not for processes that compile, which import this module too
        simulate(section, Path(given[given.index("--cache") + 1]))
        fail(section)
        return gpu.main(given)
    args, rest = parser().parse_known_args(given)
    faults = [f"{kind}:{name}" for kind in ("crash", "hang") for name in getattr(args, kind)]
    os.environ[FAULTS] = ",".join(faults)
    gpu.PROGRAM = Path(__file__).resolve()
    calls = [args.call] if args.call else sorted(gpu.CALLS)
    codes = [gpu.main([*TINY, *rest, "--call", str(call), "-o", str(args.output)]) for call in calls]
    if args.page:
        (found,) = args.output.glob("gpu-*.json")
        args.page.write_text(page(json.loads(found.read_text()), calls, given))
    return max(codes)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the options that the benchmark does not have."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--call", type=int, choices=sorted(gpu.CALLS), help="default: both, one after the other"
    )
    made.add_argument("-o", "--output", type=Path, required=True, help="folder of the benchmark's results")
    made.add_argument(
        "--page", type=Path, metavar="FILE", help="write the outcome of each section as Markdown"
    )
    for kind in ("crash", "hang"):
        made.add_argument(f"--{kind}", nargs="+", default=[], choices=list(gpu.SECTIONS), metavar="SECTION")
    return made


def page(found: dict[str, Any], calls: Sequence[int], given: Sequence[str]) -> str:
    """Return the page: limit, seconds and outcome of each section."""
    command = shlex.join(["python", "tests/tools/rehearse_gpu.py", *given])
    lines = [
        "# Rehearsal of the GPU benchmark without a GPU",
        "",
        f"Command: `{command}`. Commit: {origin.commit()}. Machine: {machine.machine_line()}.",
        "",
        "`benchmarks/gpu.py` over the simulated driver, in an environment in which moesr is not installed:",
        "what each section of its two calls took on one core of a CPU, and how it ended. Networks have a",
        "width of 16, operators their smallest case (`cubins`: the cases that are deployed), and no figure",
        "of it is the speed of a GPU. The command names the sections that were made to crash or to hang.",
        "",
        "| call | section | limit (s) | took (s) | checks held | figures | outcome |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for call in calls:
        seconds, sections = gpu.CALLS[call]
        for name in ("machine", *sections):
            part = found[name]
            held = [check["held"] for check in part["checks"]]
            outcome = part["failed"] or ("absent: " + part["absent"] if part["absent"] else "done")
            lines.append(
                f"| {call} ({seconds:.0f} s) | {name} | {gpu.SECTIONS[name].seconds:.0f} | "
                f"{part['seconds']:.0f} | "
                f"{sum(held)} of {len(held)} | {len(part['rows'])} | {' '.join(outcome.split()):.160} |"
            )
    return "\n".join(lines) + "\n"


def fail(section: str) -> None:
    """End this process by a signal, or hang, if the section was chosen for it."""
    faults = os.environ.get(FAULTS, "").split(",")
    if f"crash:{section}" in faults:
        os.kill(os.getpid(), signal.SIGSEGV)
    if f"hang:{section}" in faults:
        time.sleep(1e6)


def simulate(section: str, cache: Path) -> None:
    """Put the simulation in the place of the GPU, and small cases in the place of deployed ones."""
    known = gpu_setup.absent_unless_there
    gpu_setup.absent_unless_there = lambda *modules: known(*(m for m in modules if m != "cuda.core"))
    gpu_setup.seconds_each = seconds_each
    simulate_facts()
    if section != "machine":
        simulate_driver(cache)
        simulate_torch()
        simulate_operators(small=section != "cubins")


def seconds_each(run: Callable[[], object], sync: Callable[[], object], at_least: float = 0.0) -> float:
    """Time a single run after those in which a CUDA graph is captured."""
    for _ in range(2):
        run()
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def simulate_facts() -> None:
    """The facts of an H200, as the driver gives them."""
    from moesr.runtime.devices import cuda_driver

    facts: Any = SimpleNamespace(name=NAME)
    cuda_driver.open_device = lambda index: facts
    cuda_driver.device_capability = lambda device: 90
    cuda_driver.driver_version = lambda: "13.0"
    cuda_driver.memory_bytes = lambda: (140 * 10**9, 141 * 10**9)


def simulate_driver(cache: Path) -> None:
    """A driver with the kernels of the package and those that the benchmark compiled."""
    from cuda_simulation import SimulatedDriver

    from moesr.runtime.devices import compiled_kernels, cuda_driver, kernel_search
    from moesr.runtime.errors import EngineError

    index = functools.cache(compiled_kernels.read)

    class Driver(SimulatedDriver):
        """Runs a compiled kernel as its NumPy twin, which it finds by the kernel's hash."""

        name = NAME

        def load(self, code: bytes, entry: str, shared_bytes: int, ptx: bool = False) -> tuple[str, dict]:
            digest = hashlib.sha256(code).hexdigest()
            for directory in (kernel_search.SHIPPED, *cache.rglob("kernels")):
                if not (directory / compiled_kernels.KERNELS_NAME).is_file():
                    continue
                for kernel in index(directory).kernels.values():
                    if digest in (target.sha256 for target in kernel.targets.values()):
                        return entry, kernel.constants | {"types": kernel.arguments}
            raise EngineError(f"{entry}: there is no such kernel")

    cuda_driver.CudaDriver = lambda index=0: Driver()  # type: ignore[assignment, misc]


def simulate_torch() -> None:
    """Networks run on the CPU in float32, between buffers of the simulated GPU."""
    import numpy as np
    import torch
    from gpu_suite import networks, torch_backend

    def tensor_of(buffer: Any, batch: int) -> torch.Tensor:
        shape = buffer.spec.shape(batch)
        view = buffer.driver.view(buffer.address, int(np.prod(shape)), np.float32)
        return torch.from_numpy(view.reshape(shape))

    torch_backend.tensor_of = tensor_of
    torch_backend.on_stream = lambda driver, run: driver.library_call("network", run)
    networks.device_of = lambda: "cpu"
    networks.PRECISION = torch.float32
    networks.COPIED_BYTES, networks.SIDE = 64 << 20, 256


def simulate_operators(*, small: bool) -> None:
    """If `small`, every operator of the registry has one case, its smallest."""
    from moesr.kernels import build, dispatch, registry, ship
    from moesr.training.networks import operators

    def smallest(op: Any) -> Any:
        halves = [case for case in op.cases if case.dtype == "fp16"] or list(op.cases)
        case = min(halves, key=lambda case: op.cost(case.shape, case.dtype).bytes)
        return dataclasses.replace(op, cases=(case,), deployed=(case,))

    compiled = [op for op in ship.shipped_ops() if op.name in COMPILED]
    build.OPS = {op.name: op for op in compiled}
    if small:
        registry.OPS.update({name: smallest(op) for name, op in registry.OPS.items()})
    operators.has_kernels = lambda x: True
    dispatch.has_kernels = lambda x: False  # so that operators compute their references
    memory_of_tensors()


def memory_of_tensors() -> None:
    """Tensors of the host are memory of the simulated GPU, at the addresses that they have."""
    import torch
    from gpu_suite import cubins

    def address_of(tensor: torch.Tensor, driver: Any) -> int:
        driver.blocks[tensor.data_ptr()] = tensor.detach().view(-1).view(torch.uint8).numpy()
        return tensor.data_ptr()

    cubins.address_of = address_of
    cubins.REPEATS = 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
