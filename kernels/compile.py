"""Compile one launch for one architecture without a GPU, in a process of its own, behind a cache on disk."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moesr.kernels.assembly import Resources, disassemble, from_log, with_instructions

HIDDEN = ("global_scratch", "profile_scratch")  # pointers that Triton appends to every kernel's parameters
ALIGNMENT = 16  # of every buffer, bytes


@dataclass(frozen=True)
class Job:
    """One Triton function, its types and constants, for one architecture."""

    op: str
    function: str
    types: tuple[str, ...]  # of the run-time arguments, in order
    constants: tuple[tuple[str, int | float | bool | str], ...]
    num_warps: int
    num_stages: int
    fp_fusion: bool
    source: str  # sha256 of the operator's kernel.py

    @property
    def name(self) -> str:
        """Unique and stable: the same source, types, constants and options have the same name."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.op}.{self.function}.{digest[:12]}"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what a launch must know of it."""

    entry: str
    threads: int
    hidden: tuple[str, ...]  # what follows the visible arguments
    scratch_bytes: tuple[int, ...]  # that each hidden pointer must point to, 0: may be null
    resources: Resources
    cubin: Path
    ptx: Path


def compile_job(job: Job, arch: int, cache: Path) -> Compiled:
    """Compile, or read from the cache folder. Must run where TRITON_INTERPRET is unset."""
    import triton

    stem = cache / f"triton-{triton.__version__}" / f"sm_{arch}" / job.name
    record = stem.with_name(stem.name + ".json")
    if record.exists():
        return _from_record(json.loads(record.read_text()), stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    fields = _compile(job, arch, stem)
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(fields))
    temporary.rename(record)  # a record promises whole files
    return _from_record(fields, stem)


def _compile(job: Job, arch: int, stem: Path) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"moesr.kernels.{job.op}.kernel"), job.function)
    constants = dict(job.constants)
    visible = [name for name in function.arg_names if name not in constants]
    if len(visible) != len(job.types):
        raise ValueError(f"{job.op}.{job.function} takes {visible} at run time, the plan gives {job.types}")
    types = dict(zip(visible, job.types, strict=True))
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", ALIGNMENT]]
        for i, name in enumerate(function.arg_names)
        if types.get(name, "").startswith("*")
    }
    source = ASTSource(function, signature, constants, aligned)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "enable_fp_fusion": job.fp_fusion}
    log = io.StringIO()
    with _quiet_knobs(triton), contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin, ptx = _paths(stem)
    cubin.write_bytes(kernel.asm["cubin"])
    ptx.write_text(kernel.asm["ptx"])
    resources = with_instructions(from_log(log.getvalue(), kernel.metadata.shared), disassemble(cubin))
    parameters, threads = _entry(kernel.asm["ptx"])
    scratch = [kernel.metadata.global_scratch_size or 0, kernel.metadata.profile_scratch_size or 0]
    hidden = HIDDEN[: parameters - len(visible)]
    return {
        "entry": kernel.metadata.name,
        "threads": threads,
        "hidden": hidden,
        "scratch_bytes": scratch[: len(hidden)],
        "resources": resources.as_dict(),
    }


@contextlib.contextmanager
def _quiet_knobs(triton: object):
    """Always compile, print the assembler's log, and keep source paths out of the files."""
    knobs = triton.knobs  # type: ignore[attr-defined]
    with knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True
        knobs.compilation.disable_line_info = True
        knobs.nvidia.dump_ptxas_log = True
        yield


def _entry(ptx: str) -> tuple[int, int]:
    """How many parameters the entry takes, and the threads of a block."""
    head = ptx[ptx.index(".entry") :]
    parameters = head[: head.index(")")].count(".param")
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    if not threads:
        raise ValueError("the PTX has no .reqntid: the number of threads is unknown")
    return parameters, int(threads[1])


def _paths(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(stem.name + ".cubin"), stem.with_name(stem.name + ".ptx")


def _from_record(fields: Mapping[str, object], stem: Path) -> Compiled:
    cubin, ptx = _paths(stem)
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "resources"}
    return Compiled(**known, resources=Resources(**fields["resources"]), cubin=cubin, ptx=ptx)  # type: ignore[arg-type]
