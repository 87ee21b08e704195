"""The part of `moesr-doctor` about GPUs: driver, libraries, and an engine's kernels and plans."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path

from moesr.runtime.backends.selection import probe
from moesr.runtime.backends.tensorrt import plan_store
from moesr.runtime.backends.tensorrt.library import FLAVOURS, Library, load
from moesr.runtime.backends.tensorrt.plan_builder import as_text
from moesr.runtime.devices.compiled_kernels import BUILD, choose, read
from moesr.runtime.devices.cuda_driver import device_capability, driver_version, memory_bytes, open_device
from moesr.runtime.devices.kernel_search import build_folder, find_kernels
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import EngineError
from moesr.runtime.system import memory

Finding = tuple[str, str]
"""A label and a text."""


def findings(
    engine: Path, manifest: Manifest, index: int = 0, cache: Path | None = None
) -> Iterator[Finding]:
    """Return all findings for GPU number `index`; `cache` is the directory of plans besides the engine's own.

    Problems are returned as findings and not raised, since the engine may run on a CPU.
    """
    capability = driver = None
    try:
        device = open_device(index)
        capability, driver = device_capability(device), driver_version()
        free, total = map(memory.readable, memory_bytes())
        yield (
            "gpu",
            f"{device.name}, compute capability {as_text(capability)}, driver for CUDA {driver}, "
            f"{free} of {total} free{_bindings_note(driver)}",
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
    if capability is not None:
        yield "onnxruntime cuda", _onnxruntime()
    for folder in find_kernels(engine):
        yield "kernels", kernels(folder, capability, driver)
    folders = plan_store.plan_folders(engine, cache)
    yield from plans_of(folders, libraries[0] if libraries else None, capability)
    if libraries and capability is not None:
        yield "plans needed", needed(engine, folders, manifest, libraries[0], capability)


def _onnxruntime() -> str:
    try:
        offer = probe("onnxruntime")
    except EngineError as error:
        return f"unusable: {error}"
    if "cuda" in offer.devices:
        return f"offered by {offer.version}"
    return f"{offer.version} is for CPUs; for the GPU uninstall it and: pip install 'moesr[cuda]'"


def kernels(directory: Path, capability: int | None, driver: str | None = None) -> str:
    """Return the number of kernels, their targets, and whether a GPU and its driver can run them."""
    try:
        content = read(directory)
    except EngineError as error:
        return f"unusable: {error}"
    made = sorted({name for kernel in content.kernels.values() for name in kernel.targets})
    text = f"{len(content.kernels)} for {', '.join(made)} in {directory}"
    if capability is None:
        return text
    if all(choose(tuple(kernel.targets), capability) for kernel in content.kernels.values()):
        return f"{text}: fit{_toolkit_note(content.toolkit, driver)}"
    return f"{text}: NOT for this GPU; {BUILD.format(capability, build_folder(capability))}"


def _toolkit_note(toolkit: str, driver: str | None) -> str:
    """Return a warning if the kernels were assembled by a later CUDA release than the driver supports."""
    if not toolkit or not driver or _release(toolkit) <= _release(driver):
        return ""
    return (
        f", but assembled by CUDA {toolkit}, later than the driver's {driver}; the driver may refuse them, "
        "update the driver"
    )


def _bindings_note(driver: str) -> str:
    """Return a warning if CUDA's Python packages are of a later major release than the driver."""
    try:
        bindings = importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return ""
    if _release(bindings)[0] <= _release(driver)[0]:
        return ""
    return (
        f"; cuda-bindings {bindings} and the CUDA libraries beside it need a later driver, for CUDA "
        f"{_release(bindings)[0]}: update the driver"
    )


def _release(text: str) -> tuple[int, ...]:
    """Return the numbers of a version that its first two parts have; parts that are no numbers count as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in text.split(".")[:2])


def plans_of(folders: Sequence[Path], library: Library | None, capability: int | None) -> Iterator[Finding]:
    """Return the number of plans by kind and folder, and whether this library and GPU can run them."""
    for folder in folders:
        groups: dict[str, int] = {}
        for record in plan_store.list_plans(folder):
            what = str(record)
            if library and capability is not None:
                made_here = (record.flavour, record.version) == (library.flavour, library.version)
                fits = made_here and record.capability == capability
                what += ": fit" if fits else f": stale, this is {library} on {as_text(capability)}"
            groups[what] = groups.get(what, 0) + 1
        for what, count in groups.items() or [("none", 0)]:
            yield "plans", f"{count} for {what} in {folder}" if count else f"none in {folder}"


def needed(
    engine: Path, folders: Sequence[Path], manifest: Manifest, library: Library, capability: int
) -> str:
    """Return how many of the plans that TensorRT needs for this engine exist, and the names of the others."""
    here = (library.flavour, library.version, capability)
    records = [record for folder in folders for record in plan_store.list_plans(folder)]
    there = {r.graph_sha256 for r in records if (r.flavour, r.version, r.capability) == here}
    wanted = list(plan_store.graph_files(engine, manifest))
    missing = [file.file for file in wanted if file.sha256 not in there]
    text = f"{len(wanted) - len(missing)} of {len(wanted)} for {library} on {as_text(capability)}"
    if not missing:
        return text
    names = ", ".join(missing[:4]) + (", .." if len(missing) > 4 else "")
    return f"{text}; missing: {names}: each is built when first used, or by moesr-export --tensorrt"
