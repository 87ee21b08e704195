"""Out-of-memory errors are recognized by the phrases of allocators, never by words in a path."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from moesr.runtime.system.memory import ran_out_of_memory

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
