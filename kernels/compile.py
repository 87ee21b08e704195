"""Compiles one Triton function for one architecture without a GPU, with a cache on disk."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from moesr.kernels.assembly import Resources, disassemble, from_log, with_instructions
from moesr.runtime.system import files, json_dataclass

HIDDEN = ("global_scratch", "profile_scratch")  # pointers that Triton appends to every kernel's parameters
ALIGNMENT = 16  # of every buffer, bytes


@dataclass(frozen=True)
class Job:
    """One Triton function with its argument types, constants and options; it has no architecture yet."""

    op: str
    function: str
    types: tuple[str, ...]  # types of the run-time arguments, in order
    constants: tuple[tuple[str, int | float | bool | str], ...]
    num_warps: int
    num_stages: int
    fp_fusion: bool
    source: str  # sha256 of the operator's kernel.py without its prose

    @property
    def name(self) -> str:
        """A stable name: equal sources, types, constants and options have equal names."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.op}.{self.function}.{digest[:12]}"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and the values that a launch needs."""

    entry: str  # name of the function in the file
    threads: int  # per block
    hidden: tuple[str, ...]  # pointer parameters after the visible arguments
    scratch_bytes: tuple[int, ...]  # bytes that each hidden pointer must point to; 0: it may be null
    resources: Resources
    cubin: Path
    ptx: Path


def compile_job(job: Job, arch: int, cache: Path) -> Compiled:
    """Compile a job, or read it from the cache folder; TRITON_INTERPRET must not be set.

    A cache entry that is damaged, or that another version wrote, is compiled again.
    """
    import triton

    stem = cache / f"triton-{triton.__version__}" / f"sm_{arch}" / job.name
    record = stem.with_name(stem.name + ".json")
    with contextlib.suppress(OSError, ValueError):  # no entry, or a damaged one
        return _from_record(json_dataclass.build(_Record, json_dataclass.read_json(record)), stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    made = _compile(job, arch, stem)
    with files.write_atomically(record) as stream:
        stream.write(json.dumps(asdict(made)).encode())
    return _from_record(made, stem)


@dataclass(frozen=True)
class _Record:
    """A cache entry beside its cubin and PTX; the hashes are those of these two files."""

    entry: str
    threads: int
    hidden: tuple[str, ...]
    scratch_bytes: tuple[int, ...]
    resources: Resources
    cubin_sha256: str
    ptx_sha256: str


def _compile(job: Job, arch: int, stem: Path) -> _Record:
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
    return _Record(
        entry=kernel.metadata.name,
        threads=threads,
        hidden=hidden,
        scratch_bytes=tuple(scratch[: len(hidden)]),
        resources=resources,
        cubin_sha256=files.sha256_of(cubin),
        ptx_sha256=files.sha256_of(ptx),
    )


@contextlib.contextmanager
def _quiet_knobs(triton: object):
    """Make Triton compile always, print the assembler's log, and keep source paths out of its files."""
    knobs = triton.knobs  # type: ignore[attr-defined]
    with knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True
        knobs.compilation.disable_line_info = True
        knobs.nvidia.dump_ptxas_log = True
        yield


def _entry(ptx: str) -> tuple[int, int]:
    """Return the number of parameters of the entry, and the threads per block."""
    head = ptx[ptx.index(".entry") :]
    parameters = head[: head.index(")")].count(".param")
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    if not threads:
        raise ValueError("the PTX has no .reqntid: the number of threads is unknown")
    return parameters, int(threads[1])


def _paths(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(stem.name + ".cubin"), stem.with_name(stem.name + ".ptx")


def _from_record(record: _Record, stem: Path) -> Compiled:
    """Return the kernel that an entry describes; ValueError if its files are not those that were written."""
    cubin, ptx = _paths(stem)
    if (files.sha256_of(cubin), files.sha256_of(ptx)) != (record.cubin_sha256, record.ptx_sha256):
        raise ValueError(f"{stem.name}: its files are damaged")
    return Compiled(
        record.entry, record.threads, record.hidden, record.scratch_bytes, record.resources, cubin, ptx
    )
