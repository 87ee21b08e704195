"""What `moesr-doctor` says of a GPU: driver, TensorRT, and whether an engine's kernels and plans fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moesr.runtime import caches, plans
from moesr.runtime.cuda_driver import driver_version, open_device
from moesr.runtime.errors import EngineError
from moesr.runtime.kernel_files import BUILD, choose, find_kernels, read
from moesr.runtime.plan_builder import as_text
from moesr.runtime.tensorrt_library import FLAVOURS, Library, load

Finding = tuple[str, str]
"""Label and text."""


def findings(engine: Path, index: int = 0) -> Iterator[Finding]:
    """All of it; nothing here is an error, since a CPU may do."""
    capability = None
    try:
        device = open_device(index)
        capability = int("".join(map(str, device.compute_capability)))
        yield (
            "gpu",
            f"{device.name}, compute capability {as_text(capability)}, driver for CUDA {driver_version()}",
        )
    except EngineError as error:
        yield "gpu", f"none usable: {error}"
    libraries = []
    for flavour in FLAVOURS:
        try:
            libraries.append(load(flavour))
            yield flavour, libraries[-1].version
        except EngineError as error:
            yield flavour, f"unusable: {error}"
    yield "kernels", kernels(find_kernels(engine), capability)
    yield from plans_of(engine, libraries[0] if libraries else None, capability)


def kernels(directory: Path, capability: int | None) -> str:
    """What kernels there are, and whether a GPU can run them."""
    try:
        content = read(directory)
    except EngineError as error:
        return f"unusable: {error}"
    made = sorted({name for kernel in content.kernels.values() for name in kernel.targets})
    text = f"{len(content.kernels)} for {', '.join(made)} in {directory}"
    if capability is None:
        return text
    if all(choose(tuple(kernel.targets), capability) for kernel in content.kernels.values()):
        return f"{text}: fit"
    return f"{text}: NOT for this GPU; {BUILD.format(capability, directory)}"


def plans_of(engine: Path, library: Library | None, capability: int | None) -> Iterator[Finding]:
    """How many plans there are of each kind, and whether this library and GPU can run them."""
    for folder in plans.places(engine, caches.directory()):
        groups: dict[str, int] = {}
        for record in plans.list_plans(folder):
            what = str(record)
            if library and capability is not None:
                made_here = (record.flavour, record.version) == (library.flavour, library.version)
                fits = made_here and record.capability == capability
                what += ": fit" if fits else f": stale, this is {library} on {as_text(capability)}"
            groups[what] = groups.get(what, 0) + 1
        for what, count in groups.items() or [("none", 0)]:
            yield "plans", f"{count} for {what} in {folder}" if count else f"none in {folder}"
