"""Compile the kernels ahead of time, without a GPU, into files that a CUDA driver launches without Python.

Writes DIR/sm_XX/*.cubin for each architecture, DIR/ptx/*.ptx that the driver of a later one can compile,
DIR/tables/*.bin, the bytes of constant buffers, and DIR/kernels.json, which says how to launch all of it
(kernels/README.md).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesr.kernels.compile import ALIGNMENT, Compiled, Job, compile_job
from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import ARCHITECTURES, Case, Launch, Op, Plan, check_compiler
from moesr.kernels.registry import OPS
from moesr.kernels.report import write_report
from moesr.runtime.devices.grid_expressions import evaluate
from moesr.runtime.errors import UsageError

SCHEMA = 2
PTX_ARCHITECTURE = 89  # the last whose PTX every later architecture takes, with 99 KiB of shared memory
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moesr" / "kernels"


@dataclass(frozen=True, eq=False)
class Deployment:
    """One operator at one shape and type for one architecture, and the job of each of its launches."""

    op: Op
    case: Case
    arch: int
    plan: Plan
    jobs: tuple[Job, ...]


def source_hash(op: str) -> str:
    """sha256 of the operator's kernel.py, which imports nothing but triton."""
    return hashlib.sha256((Path(__file__).parent / op / "kernel.py").read_bytes()).hexdigest()


def deployments(ops: Iterable[Op], architectures: Iterable[int]) -> Iterator[Deployment]:
    """Everything that the registry's rows want compiled."""
    for op in ops:
        source = source_hash(op.name)
        for case in op.deployed:
            for arch in architectures:
                plan = op.plan(case.shape, case.dtype, arch)
                jobs = tuple(_job(op.name, plan, launch, source) for launch in plan.launches)
                yield Deployment(op, case, arch, plan, jobs)


def _job(op: str, plan: Plan, launch: Launch, source: str) -> Job:
    types = tuple(plan.type_of(a) for a in launch.arguments)
    constants = tuple(launch.constants.items())
    return Job(
        op, launch.function, types, constants, launch.num_warps, launch.num_stages, launch.fp_fusion, source
    )


def compile_all(
    wanted: Iterable[tuple[Job, int]], cache: Path = CACHE, processes: int | None = None
) -> dict[tuple[Job, int], Compiled]:
    """Compile each (job, architecture) once, in processes that see no TRITON_INTERPRET."""
    unique = list(dict.fromkeys(wanted))
    context = multiprocessing.get_context("spawn")
    with _compiling(), ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
        jobs, architectures = [j for j, _ in unique], [a for _, a in unique]
        done = pool.map(compile_job, jobs, architectures, [cache] * len(unique))
        return dict(zip(unique, done, strict=True))


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Children that start inside see neither the interpreter's switch nor this process's main module."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def build(
    directory: Path,
    architectures: Sequence[int] = ARCHITECTURES,
    ops: Sequence[Op] = (),
    cache: Path = CACHE,
    processes: int | None = None,
) -> dict[str, Any]:
    """Compile `ops` (default: all) into a new or empty directory; returns what kernels.json holds."""
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; name a new directory")
    rows = list(ops or OPS.values())
    every = list(deployments(rows, dict.fromkeys([*architectures, PTX_ARCHITECTURE])))
    compiled = compile_all(((j, d.arch) for d in every for j in d.jobs), cache, processes)
    kernels: dict[str, Any] = {}
    for job, arch in compiled:
        _add_kernel(kernels, directory, job, arch, compiled[job, arch], arch in architectures)
    content = {
        "schema": SCHEMA,
        "triton": _triton_version(),
        "alignment": ALIGNMENT,
        "architectures": [f"sm_{a}" for a in architectures],
        "sources": {op.name: source_hash(op.name) for op in rows},
        "kernels": dict(sorted(kernels.items())),
        "plans": _plans(every, architectures, directory),
    }
    (directory / "kernels.json").write_text(json.dumps(content, indent=1) + "\n")
    return content


def _add_kernel(
    kernels: dict[str, Any], directory: Path, job: Job, arch: int, done: Compiled, cubin: bool
) -> None:
    kernel = kernels.setdefault(
        job.name,
        {
            "op": job.op,
            "function": job.function,
            "arguments": list(job.types),
            "constants": dict(job.constants),
            "targets": {},
        },
    )
    files = [(f"sm_{arch}", done.cubin)] if cubin else []
    files += [("ptx", done.ptx)] if arch == PTX_ARCHITECTURE else []
    for target, path in files:
        file = directory / target / f"{job.name}{path.suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, file)
        kernel["targets"][target] = {
            "file": file.relative_to(directory).as_posix(),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "entry": done.entry,
            "threads": done.threads,
            "hidden": dict(zip(done.hidden, done.scratch_bytes, strict=True)),
            **done.resources.as_dict(),
        }


def _plans(
    every: Sequence[Deployment], architectures: Sequence[int], directory: Path
) -> list[dict[str, Any]]:
    """One entry for each distinct plan of a case, with the targets that it serves."""
    entries: dict[str, dict[str, Any]] = {}
    for d in every:
        entry = {
            "op": d.op.name,
            "case": d.case.name,
            "dtype": d.case.dtype,
            "shape": dict(d.case.shape),
            "scalars": dict(d.plan.scalars),
            "buffers": [_buffer(d, b.name, directory) for b in d.plan.buffers],
            "launches": [
                {
                    "kernel": job.name,
                    "arguments": list(launch.arguments),
                    "grid": [substitute(e, launch.constants) for e in launch.grid],
                }
                for job, launch in zip(d.jobs, d.plan.launches, strict=True)
            ],
        }
        entry = entries.setdefault(json.dumps(entry, sort_keys=True), entry)
        targets = entry.setdefault("targets", [])
        targets += [f"sm_{d.arch}"] if d.arch in architectures else []
        targets += ["ptx"] if d.arch == PTX_ARCHITECTURE else []
    return list(entries.values())


def _buffer(d: Deployment, name: str, directory: Path) -> dict[str, Any]:
    buffer = next(b for b in d.plan.buffers if b.name == name)
    entry: dict[str, Any] = {
        "name": name,
        "dtype": buffer.dtype,
        "role": buffer.role,
        "shape": list(buffer.shape),
    }
    if buffer.role == "table":
        table = torch.from_numpy(d.plan.tables[name]).to(DTYPES[buffer.dtype]).contiguous()
        stored = table.view(torch.uint8).numpy().tobytes()
        file = directory / "tables" / f"{hashlib.sha256(stored).hexdigest()[:16]}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(stored)
        entry["file"] = file.relative_to(directory).as_posix()
    return entry


def substitute(expression: str, constants: Mapping[str, Any]) -> str:
    """The expression with its constants as numbers; a number alone where no scalar is left."""
    import ast

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.Constant(int(constants[node.id])) if node.id in constants else node

    filled = ast.unparse(Fill().visit(ast.parse(expression, mode="eval")))
    try:
        return str(evaluate(filled, {}))
    except ValueError:  # a scalar is left
        return filled


def _triton_version() -> str:
    import triton

    return triton.__version__


def _architecture(text: str) -> int:
    number = int(text.removeprefix("sm_"))
    if number not in ARCHITECTURES:
        raise ValueError(text)
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `python -m moesr.kernels.build --arch sm_90 -o DIR`."""
    parser = argparse.ArgumentParser(prog="moesr.kernels.build", description=__doc__)
    known = " ".join(f"sm_{a}" for a in ARCHITECTURES)
    parser.add_argument(
        "--arch",
        nargs="+",
        type=_architecture,
        default=list(ARCHITECTURES),
        help=f"of {known} (default: all)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="new or empty directory"
    )
    parser.add_argument("--op", nargs="+", choices=sorted(OPS), default=sorted(OPS), help="default: all")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write registers and spills as Markdown")
    parser.add_argument("--cache", type=Path, default=CACHE, help="compiled kernels (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    args = parser.parse_args(arguments)
    try:
        check_compiler()
        content = build(args.output, args.arch, [OPS[name] for name in args.op], args.cache, args.jobs)
    except (FileExistsError, UsageError) as error:
        sys.exit(f"error: {error}")
    if args.report:
        write_report(content, args.report)
    print(f"{len(content['kernels'])} kernels, {len(content['plans'])} plans: {args.output / 'kernels.json'}")


if __name__ == "__main__":
    main()
