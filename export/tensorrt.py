"""Builds TensorRT plans and compiles our kernels ahead of time, into an engine directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moesr.runtime.backends.tensorrt import plan_store
from moesr.runtime.backends.tensorrt.backend import MAX_BATCH
from moesr.runtime.backends.tensorrt.library import Library, load
from moesr.runtime.backends.tensorrt.plan_builder import as_text, build_plan, capability_of
from moesr.runtime.devices.cuda_driver import device_capability, open_device
from moesr.runtime.devices.kernel_search import KERNELS_FOLDER
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.partitioned_graph import SUFFIX, KernelStep, read_parts
from moesr.runtime.errors import EngineError, OutputError, UsageError
from moesr.runtime.system import user_cache
from moesr.runtime.system.files import reason

BF16_FROM = 80  # compute capability

OnStage = Callable[[str, float], None]
"""Called with the name of the plan that is being built and the fraction of it that is done."""


@dataclass(frozen=True)
class Built:
    """A plan in an engine directory and its size."""

    directory: Path
    nbytes: int


def capabilities(library: Library, given: Sequence[int]) -> list[int]:
    """Return the compute capabilities to build for: the given ones, or that of this machine's GPU.

    UsageError or EngineError is raised if the library cannot build for them.
    """
    if library.ahead_of_time and given:
        for capability in given:
            capability_of(library, capability)
        return list(given)
    try:
        present = device_capability(open_device(0))
    except EngineError as error:
        if library.ahead_of_time:
            raise UsageError(f"name the GPU to build for, such as --capability 8.9 ({error})") from error
        raise EngineError(f"{library} builds for the GPU that is present only: {error}") from error
    if given and list(given) != [present]:
        raise UsageError(
            f"{library} builds for the GPU that is present only, of compute capability {as_text(present)}; "
            "leave out --capability, or install moesr[tensorrt-rtx]"
        )
    return [present]


def check_precision(precision: str, capabilities: Sequence[int]) -> None:
    """Raise UsageError if one of the GPUs does not support the precision."""
    if precision == "bf16" and (old := [c for c in capabilities if c < BF16_FROM]):
        raise UsageError(
            f"--bf16 needs a GPU of compute capability {as_text(BF16_FROM)} or later, not {as_text(old[0])}; "
            "export with --fp16 for that GPU"
        )


def build_plans(
    directory: Path,
    manifest: Manifest,
    given: Sequence[int],
    *,
    max_batch: int = MAX_BATCH,
    on_stage: OnStage = lambda stage, share: None,
) -> list[Built]:
    """Build the plans of an engine into its directory; matching plans that exist are kept."""
    library, built = load(), []
    folder = directory / plan_store.PLANS_FOLDER
    for capability in capabilities(library, given):
        for file in plan_store.graph_files(directory, manifest):
            key = plan_store.key_of(library, file.sha256, capability, max_batch)
            data = plan_store.read_plan(key, [folder])
            if data is None:
                stage = f"plan {file.file} for {as_text(capability)}"
                data = build_plan(
                    library,
                    directory / file.file,
                    capability,
                    max_batch,
                    timing_cache=plan_store.timings(user_cache.directory(), key),
                    on_progress=lambda share, stage=stage: on_stage(stage, share),
                )
                plan_store.write_plan(folder, key, file.file, data)
            built.append(Built(folder / key.name, len(data)))
    return built


def kernel_steps(directory: Path, manifest: Manifest) -> list[KernelStep]:
    """Return all uses of our kernels in an engine's graphs."""
    found = []
    for graph in manifest.graphs.values():
        arrangement = graph.arrangement("parts")
        if arrangement.file.endswith(SUFFIX):
            steps = read_parts(directory / arrangement.file).steps
            found += [step.kernel for step in steps if step.kernel]
    return found


def build_kernels(directory: Path, manifest: Manifest, given: Sequence[int]) -> Path:
    """Compile the kernels of an engine's graphs and of the sampling loop into its directory."""
    from moesr.kernels.build import build
    from moesr.kernels.plan import Case
    from moesr.kernels.registry import LOOP, OPS

    cases: dict[str, dict[str, Case]] = {}
    for step in kernel_steps(directory, manifest):
        case = Case(
            f"{manifest.name}{manifest.tile}", {"batch": 1, "heads": 1, **step.shape}, step.dtype, 0.0
        )
        cases.setdefault(step.op, {})[f"{sorted(step.shape.items())} {step.dtype}"] = case
    ops = [replace(OPS[op], deployed=tuple(found.values())) for op, found in cases.items()]
    loop = [replace(op, deployed=tuple(c for c in op.deployed if c.dtype == "fp32")) for op in LOOP]
    target = directory / KERNELS_FOLDER
    try:
        build(target, tuple(given), [*ops, *loop])
    except OSError as error:
        raise OutputError(f"{target}: cannot write the kernels: {reason(error)}") from error
    return target
