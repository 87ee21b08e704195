"""Out-of-memory errors are recognized by the phrases of allocators, never by words in a path."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from moesr.runtime.system.memory import available_bytes, ran_out_of_memory

SHORTAGES = [
    MemoryError(),
    MemoryError("Unable to allocate 1.2 GiB for an array"),
    OSError(errno.ENOMEM, "Cannot allocate memory", "a.png"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("bad allocation"),
    RuntimeError(
        "[ONNXRuntimeError] : 6 : bfc_arena.cc:359 Failed to allocate memory for requested buffer of size 9"
    ),
    RuntimeError("Available memory of 100 is smaller than requested bytes of 400"),
    RuntimeError("Exception from src/x.cpp:3:\ncan't alloc"),
    RuntimeError("Exceeded max size of memory object allocation: requested 7 bytes"),
    RuntimeError("can't allocate lock"),
    RuntimeError("can't start new thread"),
    "CUDA failure 2: out of memory ; GPU=0 ; hostname=x",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Error Code: OutOfMemory (Requested size was 12 bytes)",
    "Requested amount of GPU memory (12 bytes) could not be allocated.",
    "CL_OUT_OF_HOST_MEMORY",
    "cudaErrorMemoryAllocation",
]

OTHERS = [
    RuntimeError("Load model from /data/allocated-engine/expert_0.onnx failed:Protobuf parsing failed."),
    RuntimeError("Load model from /data/out of memory/expert_0.onnx failed"),
    RuntimeError("Load model from C:\\failed to allocate\\e.onnx failed"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.png"),
    RuntimeError("the node alloc_3 has no input named allocation"),
    RuntimeError("shape of reallocated tensor differs"),
    ImportError("libx.so: cannot allocate memory in static TLS block"),
    ValueError("memory format is not supported by this allocator"),
]


@pytest.mark.parametrize("problem", SHORTAGES, ids=str)
def test_messages_of_allocators_are_out_of_memory(problem: BaseException | str):
    assert ran_out_of_memory(problem)


@pytest.mark.parametrize("problem", OTHERS, ids=str)
def test_other_errors_are_not_out_of_memory(problem: BaseException):
    assert not ran_out_of_memory(problem)


def test_paths_given_by_the_caller_are_ignored():
    path = Path("/data/we failed to allocate/out of memory.onnx")
    text = f"Load model from {path} failed: {path.name} is damaged"
    assert ran_out_of_memory(text)
    assert not ran_out_of_memory(text, path)
    assert ran_out_of_memory(f"{text}: std::bad_alloc", path)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_nested_control_groups_count(tmp_path: Path, version: int):
    """The limit of a group above that of the process is the smallest here."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    own = cgroup / ("memory" if version == 1 else "") / "user.slice" / "run.scope"
    own.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemAvailable: 8000 kB\n")
    lines = (
        "0::/user.slice/run.scope\n" if version == 2 else "4:cpu,memory:/user.slice/run.scope\n1:pids:/x\n"
    )
    (proc / "self" / "cgroup").write_text(lines)
    names = ("memory.max", "memory.current") if version == 2 else LIMIT_1
    assert available_bytes(proc, cgroup) == 8000 * 1024
    for folder, limit, used in ((own, 7000, 100), (own.parent, 5000, 1000)):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
    assert available_bytes(proc, cgroup) == 4000
    (own.parent / names[0]).write_text("max\n")
    assert available_bytes(proc, cgroup) == 6900


LIMIT_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_count(name: str):
    code = (
        "import resource; from moesr.runtime.system import memory; from pathlib import Path\n"
        "used = {line.split(':')[0]: line.split() for line in open('/proc/self/status')}\n"
        f"used = int(used['VmSize' if '{name}' == 'RLIMIT_AS' else 'VmData'][1]) * 1024\n"
        f"resource.setrlimit(resource.{name}, (used + (40 << 20),) * 2)\n"
        "print(memory.available_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 30 << 20 < int(done.stdout) <= 40 << 20
