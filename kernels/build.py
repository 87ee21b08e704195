"""Compile the kernels ahead of time, without a GPU, into files that a CUDA driver launches without Python.

Writes DIR/sm_XX/*.cubin for each architecture, DIR/ptx/*.ptx, which the driver of a later architecture can
compile, DIR/tables/*.bin with the bytes of constant buffers, and DIR/kernels.json, which says how to launch
all of them (kernels/README.md).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesr.kernels.compile import ALIGNMENT, Compiled, Job, compile_job
from moesr.kernels.launch import DTYPES
from moesr.kernels.plan import ARCHITECTURES, Case, Op, TritonLaunch, TritonPlan, check_compiler
from moesr.kernels.registry import OPS
from moesr.kernels.report import write_report
from moesr.runtime.devices.grid_expressions import evaluate
from moesr.runtime.devices.operator_plan import (
    SCHEMA,
    CompiledKernel,
    KernelIndex,
    KernelLaunch,
    KernelTarget,
    OperatorPlan,
    PlanBuffer,
)
from moesr.runtime.errors import UsageError
from moesr.runtime.system import user_cache
from moesr.runtime.system.files import reason

PTX_ARCHITECTURE = 89  # the last whose PTX every later architecture accepts, with 99 KiB of shared memory
CACHE_FOLDER = "kernels"


@dataclass(frozen=True, eq=False)
class Deployment:
    """One operator at one shape and data type for one architecture, with one job for each launch."""

    op: Op
    case: Case
    arch: int
    plan: TritonPlan
    jobs: tuple[Job, ...]


def source_hash(op: str) -> str:
    """Return the sha256 of the code in the operator's kernel.py, which imports nothing but triton.

    Comments, docstrings and empty lines do not count, since the compiled kernels do not depend on them.
    """
    return hashlib.sha256(
        code_of((Path(__file__).parent / op / "kernel.py").read_bytes()).encode()
    ).hexdigest()


def code_of(source: bytes) -> str:
    """Return the tokens of Python source, one per line, without comments, docstrings and empty lines."""
    found: list[str] = []
    begins = prose = False  # whether the next token begins a statement, and whether this one is a docstring
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        prose = (begins and token.type == tokenize.STRING) or (prose and token.type == tokenize.NEWLINE)
        if not prose and token.type != tokenize.ENCODING:
            found.append(f"{tokenize.tok_name[token.type]} {token.string.strip()}")
        begins = token.type in (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return "\n".join(found)


def deployments(ops: Iterable[Op], architectures: Iterable[int]) -> Iterator[Deployment]:
    """Yield every deployed case of the operators for every architecture."""
    for op in ops:
        source = source_hash(op.name)
        for case in op.deployed:
            for arch in architectures:
                plan = op.plan(case.shape, case.dtype, arch)
                jobs = tuple(_job(plan, launch, source) for launch in plan.launches)
                yield Deployment(op, case, arch, plan, jobs)


def _job(plan: TritonPlan, launch: TritonLaunch, source: str) -> Job:
    types = tuple(plan.type_of(a) for a in launch.arguments)
    constants = tuple(launch.constants.items())
    options = launch.num_warps, launch.num_stages, launch.fp_fusion
    return Job(plan.op, launch.function, types, constants, *options, source)


@contextlib.contextmanager
def cache_folder(chosen: Path | None) -> Iterator[Path]:
    """Yield the folder that keeps compiled kernels: `chosen`, or one in the user's cache (see `user_cache`).

    If the user has no cache directory, it is a temporary folder that is removed afterwards.
    """
    shared = user_cache.directory()
    if chosen or shared:
        yield chosen or Path(str(shared)) / CACHE_FOLDER
        return
    with tempfile.TemporaryDirectory(prefix="moesr-kernels-") as temporary:
        yield Path(temporary)


def compile_all(
    wanted: Iterable[tuple[Job, int]], cache: Path, processes: int | None = None
) -> dict[tuple[Job, int], Compiled]:
    """Compile each (job, architecture) once, in worker processes that do not see TRITON_INTERPRET."""
    unique = list(dict.fromkeys(wanted))
    context = multiprocessing.get_context("spawn")
    with _compiling(), ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
        jobs, architectures = [j for j, _ in unique], [a for _, a in unique]
        done = pool.map(compile_job, jobs, architectures, [cache] * len(unique))
        return dict(zip(unique, done, strict=True))


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Hide TRITON_INTERPRET from the processes that start inside the block."""
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
    cache: Path | None = None,
    processes: int | None = None,
) -> KernelIndex:
    """Compile `ops` (default: all) into a new or empty directory and return what kernels.json holds.

    `cache` is the folder that keeps compiled kernels between builds (see `cache_folder`). FileExistsError is
    raised if the directory is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; name a new directory")
    rows = list(ops or OPS.values())
    every = list(deployments(rows, dict.fromkeys([*architectures, PTX_ARCHITECTURE])))
    with cache_folder(cache) as folder:
        compiled = compile_all(((j, d.arch) for d in every for j in d.jobs), folder, processes)
        kernels: dict[str, CompiledKernel] = {}
        for (job, arch), done in compiled.items():
            _add_kernel(kernels, directory, job, arch, done, arch in architectures)
    index = KernelIndex(
        schema=SCHEMA,
        triton=_triton_version(),
        toolkit=_toolkit([*architectures, PTX_ARCHITECTURE]),
        alignment=ALIGNMENT,
        architectures=tuple(f"sm_{a}" for a in architectures),
        sources={op.name: source_hash(op.name) for op in rows},
        kernels=dict(sorted(kernels.items())),
        plans=_plans(every, architectures, directory),
    )
    (directory / "kernels.json").write_text(index.to_json())
    return index


def _add_kernel(
    kernels: dict[str, CompiledKernel], directory: Path, job: Job, arch: int, done: Compiled, cubin: bool
) -> None:
    """Copy one compiled kernel into the directory and list it."""
    new = CompiledKernel(job.op, job.function, job.types, dict(job.constants), {})
    kernel = kernels.setdefault(job.name, new)
    files = [(f"sm_{arch}", done.cubin)] if cubin else []
    files += [("ptx", done.ptx)] if arch == PTX_ARCHITECTURE else []
    for target, path in files:
        file = directory / target / f"{job.name}{path.suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, file)
        kernel.targets[target] = KernelTarget(
            file=file.relative_to(directory).as_posix(),
            sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
            entry=done.entry,
            threads=done.threads,
            hidden=dict(zip(done.hidden, done.scratch_bytes, strict=True)),
            **done.resources.as_dict(),
        )


def _plans(
    every: Sequence[Deployment], architectures: Sequence[int], directory: Path
) -> tuple[OperatorPlan, ...]:
    """Return one entry for each distinct plan of a case, with the targets that it serves."""
    entries: dict[str, OperatorPlan] = {}
    for d in every:
        launches = zip(d.jobs, d.plan.launches, strict=True)
        plan = OperatorPlan(
            op=d.op.name,
            case=d.case.name,
            dtype=d.case.dtype,
            shape=dict(d.case.shape),
            scalars=dict(d.plan.scalars),
            buffers=tuple(_stored(d.plan, buffer, directory) for buffer in d.plan.buffers),
            launches=tuple(_compiled_launch(job, launch) for job, launch in launches),
        )
        key = json.dumps(asdict(plan), sort_keys=True)
        own = (f"sm_{d.arch}",) if d.arch in architectures else ()
        own += ("ptx",) if d.arch == PTX_ARCHITECTURE else ()
        known = entries.get(key, plan)
        entries[key] = replace(known, targets=known.targets + own)
    return tuple(entries.values())


def _compiled_launch(job: Job, launch: TritonLaunch) -> KernelLaunch:
    """Return the launch with its compiled kernel's name, and with the constants filled into its grid."""
    return KernelLaunch(
        job.name, launch.arguments, tuple(substitute(str(size), launch.constants) for size in launch.grid)
    )


def _stored(plan: TritonPlan, buffer: PlanBuffer, directory: Path) -> PlanBuffer:
    """Return the buffer; a table's bytes are written to a file, which the buffer then names."""
    if buffer.role != "table":
        return buffer
    table = torch.from_numpy(plan.tables[buffer.name]).to(DTYPES[buffer.dtype]).contiguous()
    stored = table.view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(stored).hexdigest()
    file = directory / "tables" / f"{digest[:16]}.bin"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(stored)
    return replace(buffer, file=file.relative_to(directory).as_posix(), sha256=digest)


def substitute(expression: str, constants: Mapping[str, Any]) -> str:
    """Replace constants by their values; the result is a plain number if no scalar is left."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.Constant(int(constants[node.id])) if node.id in constants else node

    filled = ast.unparse(Fill().visit(ast.parse(expression, mode="eval")))
    try:
        return str(evaluate(filled, {}))
    except ValueError:  # a scalar is left
        return filled


def _toolkit(architectures: Iterable[int]) -> str:
    """Return the newest CUDA release among the assemblers that Triton uses for these architectures."""
    from triton.backends.nvidia.compiler import get_ptxas

    releases = [str(get_ptxas(arch).version) for arch in architectures]
    return max(releases, key=lambda release: tuple(map(int, release.split("."))))


def _triton_version() -> str:
    import triton

    return triton.__version__


def _architecture(text: str) -> int:
    number = int(text.removeprefix("sm_"))
    if number not in ARCHITECTURES:
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    made = argparse.ArgumentParser(prog="moesr.kernels.build", description=__doc__)
    known, every = " ".join(f"sm_{a}" for a in ARCHITECTURES), list(ARCHITECTURES)
    add = made.add_argument
    add("--arch", nargs="+", type=_architecture, default=every, help=f"of {known} (default: all)")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="new or empty directory")
    add("--op", nargs="+", choices=sorted(OPS), default=sorted(OPS), help="operators (default: all)")
    add("--report", type=Path, metavar="FILE", help="write registers, spills and counts as Markdown")
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keeps compiled kernels between builds (default: kernels/ in $MOESR_CACHE, "
        "$XDG_CACHE_HOME/moesr or ~/.cache/moesr)",
    )
    add("--jobs", type=int, help="processes (default: one per core)")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: `python -m moesr.kernels.build --arch sm_90 -o DIR`."""
    args = parser().parse_args(arguments)
    try:
        check_compiler()
        index = build(args.output, args.arch, [OPS[name] for name in args.op], args.cache, args.jobs)
        if args.report:
            write_report(index, args.report)
    except (FileExistsError, UsageError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {args.output}: cannot write the kernels: {reason(error)}")
    print(f"{len(index.kernels)} kernels, {len(index.plans)} plans: {args.output / 'kernels.json'}")


if __name__ == "__main__":
    main()
