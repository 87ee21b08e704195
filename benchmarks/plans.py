"""Build the TensorRT plans of the published model ahead of time, without a GPU: sizes, build times, traffic.

The plans are those of an expert, the whole decoder, and the decoder in parts, in both half precisions, for
one tile and for several tiles per run, with seeded weights. For the inverted residuals of the refinement
network the page also shows the estimates for plans and for our kernel (`fused_time_ratio`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
import torch
from benchlib.origin import origin_line
from gpu_suite.networks import networks as seeded_networks
from gpu_suite.setup import Setup
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.expert import expert_graph
from moesr.export.graphs.kernel_call import KernelCall
from moesr.export.graphs.kernel_nodes import fused_time_ratio
from moesr.export.lowering import Lowering, Precision, lowering
from moesr.export.partition import partition
from moesr.export.partition.writer import write_parts
from moesr.runtime.backends.tensorrt.library import Library, load
from moesr.runtime.backends.tensorrt.plan_builder import as_text, build_plan
from moesr.runtime.engine.partitioned_graph import NHWC, Parts, layout, read_parts
from moesr.runtime.errors import MoesrError
from moesr.training.networks import Autoencoder, DenoisingUNet
from moesr.training.networks.refinement import InvertedResidual

HALF: tuple[Precision, ...] = ("fp16", "bf16")
RESULTS = Path(__file__).parent / "results" / "plans.md"


@dataclass(frozen=True)
class Built:
    """A built plan: bytes of its graph and of the plan, and the seconds that the build took."""

    name: str
    batch: int  # largest number of tiles per run
    graph_bytes: int
    plan_bytes: int
    seconds: float


def say(plan: Built) -> None:
    """Print one line about a plan to stderr."""
    print(f"{plan.name}: {plan.plan_bytes / 1e6:.1f} MB in {plan.seconds:.1f} s", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the plans, print the page and write it; returns 0 or the exit code of the error."""
    args = parser().parse_args(argv)
    setup = Setup(args.width, args.channels, args.tile)
    try:
        with tempfile.TemporaryDirectory(prefix="moesr-plans-") as scratch:
            text = page(setup, load("tensorrt_rtx"), args.capability, args.max_batch, Path(scratch))
    except MoesrError as error:
        print(f"plans: {error}", file=sys.stderr)
        return error.exit_code
    print(text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n", encoding="utf-8")
    return 0


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--width", type=int, default=160, help="width of the UNet (default: 160, as published)")
    p.add_argument("--channels", type=int, default=128, help="channels of the decoder (default: 128)")
    p.add_argument("--tile", type=int, default=512, metavar="PX", help="side of a tile (default: 512)")
    p.add_argument(
        "--max-batch", type=int, nargs="+", default=[1, 4], help="largest batches of the plans (default: 1 4)"
    )
    p.add_argument("--capability", type=int, default=89, help="compute capability, 89 for 8.9 (default: 89)")
    p.add_argument("-o", "--output", type=Path, default=RESULTS, help="default: %(default)s")
    return p


def page(
    setup: Setup,
    library: Library,
    capability: int,
    batches: Sequence[int],
    scratch: Path,
    on_built: Callable[[Built], object] = say,
) -> str:
    """Build all plans and return the page; `on_built` is called with every plan."""
    networks = seeded_networks(setup)
    rows, calls, listed = list[Built](), list[KernelCall](), None
    for precision in HALF:
        paths, calls, listed = write(*networks, setup, lowering("gpu", precision), scratch)
        for batch in batches:
            plans = []
            for path in paths:
                plans.append(build(library, path, capability, batch))
                on_built(plans[-1])
            rows += [*plans[:2], sum_of(plans[2:], precision)]
    assert listed
    sizes = {name: listed.nbytes(name, batches[0]) for name in listed.lives()}
    _, total = layout(sizes, listed.lives())
    last = sum(name.endswith(NHWC) for name in sizes)
    lines = [
        "# Plans, built ahead of time without a GPU\n",
        origin_line() + "\n",
        f"Library: {library}, compute capability {as_text(capability)}, half "
        f"precision, tiles of {setup.tile} px; UNet width {setup.width}, decoder channels {setup.channels}. "
        "A plan for several tiles per run has two profiles: one tuned for its largest batch, and one for a "
        "single tile.\n",
        *table(rows),
        f"Between the {len(listed.steps)} steps of the decoder in parts ({len(listed.steps) - len(calls)} "
        f"plans, {len(calls)} kernels), for up to {batches[0]} per run, {len(sizes)} values of "
        f"{sum(sizes.values()) / 1e6:.0f} MB in all share {total / 1e6:.0f} MB; {last} of them lie channels "
        "last.\n",
        *decisions(calls, networks[1], setup.tile),
    ]
    return "\n".join(lines)


def write(
    expert: DenoisingUNet, decoder: Autoencoder, setup: Setup, choices: Lowering, folder: Path
) -> tuple[list[Path], list[KernelCall], Parts]:
    """Write the graphs of the expert, the decoder and its parts; returns paths, kernels and list of parts."""
    side = setup.tile // 4
    paths = [folder / f"{name}, {choices.precision}.onnx" for name in ("expert", "decoder")]
    paths[0].write_bytes(expert_graph(expert, side, choices).to_bytes())
    paths[1].write_bytes(decoder_graph(decoder, side, choices).to_bytes())
    built = decoder_graph(decoder, side, replace(choices, kernels=True))
    parts = partition.cut(built)
    main_file, *_ = write_parts(folder, "decoder", built, parts)
    listed = read_parts(folder / main_file.file)
    paths += [folder / step.plan.file for step in listed.steps if step.plan]
    return paths, [part for part in parts if isinstance(part, KernelCall)], listed


def build(library: Library, path: Path, capability: int, max_batch: int) -> Built:
    """Build one plan and measure it."""
    start = time.perf_counter()
    plan = build_plan(library, path, capability, max_batch)
    taken = time.perf_counter() - start
    return Built(path.stem, max_batch, path.stat().st_size, len(plan), taken)


def sum_of(pieces: Sequence[Built], precision: str) -> Built:
    """Sum the parts of the decoder to one row."""
    figures = zip(*((p.graph_bytes, p.plan_bytes, p.seconds) for p in pieces), strict=True)
    graph, plan, seconds = (sum(column) for column in figures)
    name = f"decoder in {len(pieces)} parts, {precision}"
    return Built(name, pieces[0].batch, int(graph), int(plan), seconds)


def table(built: Sequence[Built]) -> Iterator[str]:
    """Yield the table of sizes and build times."""
    yield "| graph | tiles per run | ONNX (MB) | plan (MB) | build (s) |"
    yield "| --- | --- | --- | --- | --- |"
    for b in built:
        sizes = f"{b.graph_bytes / 1e6:.1f} | {b.plan_bytes / 1e6:.1f}"
        yield f"| {b.name} | up to {b.batch} | {sizes} | {b.seconds:.1f} |"
    yield ""


def decisions(calls: Sequence[KernelCall], decoder: Autoencoder, tile: int) -> Iterator[str]:
    """Yield the table of the inverted residuals: estimates for plans and kernel, and which is used."""
    chosen = {tuple(sorted(call.shape.items())) for call in calls if call.op == "inverted_residual"}
    yield "Inverted residuals of the refinement network, one tile, half precision:\n"
    yield "| channels, pixels | blocks | plans (MB) | our kernel (MB) | time, kernel over plans | used |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (channels, out, size), count in residuals(decoder, tile).items():
        shape = {"channels": channels, "out": out, "height": size, "width": size, "channels_last": 1}
        pixels, kept = size * size * 2, channels if channels == out else 0
        plans, kernel = (17 * channels + out + kept) * pixels, (channels + 3 * out) * pixels
        taken = "kernel" if tuple(sorted(shape.items())) in chosen else "plans"
        yield (
            f"| {channels} -> {out}, {size}x{size} | {count} | {plans / 1e6:.0f} | {kernel / 1e6:.0f} | "
            f"{fused_time_ratio(shape, 'fp16'):.2f} | {taken} |"
        )
    yield ""
    yield (
        "Bytes are the least that each pass reads and writes. The time of a pass is that of its bytes or of "
        "its products, whichever is longer on an H200 (4.3 TB/s, 790 TFLOP/s); for the kernel, the time to "
        "issue its instructions is a third bound. No time was measured on a GPU. Plans are the default; "
        "`moesr-export --residuals kernels` selects the kernel."
    )


def residuals(decoder: Autoencoder, tile: int) -> dict[tuple[int, int, int], int]:
    """Count the inverted residuals by channels, outputs and side, in the order in which they run."""
    found: dict[tuple[int, int, int], int] = {}

    def note(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        key = given[0].shape[1], made.shape[1], made.shape[2]
        found[key] = found.get(key, 0) + 1

    with FakeTensorMode(), torch.no_grad():
        network = Autoencoder(decoder.config).eval()
        for module in network.modules():
            if isinstance(module, InvertedResidual):
                module.register_forward_hook(note)
        network.decode(torch.empty(1, 3, tile // 4, tile // 4), torch.empty(1, 3, tile, tile))
    return found


if __name__ == "__main__":
    sys.exit(main())
