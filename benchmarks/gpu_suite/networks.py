"""The PyTorch sections of benchmarks/gpu.py: seeded networks, their results on the host, and their speed."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from benchlib import macs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_suite.setup import Absent, Report, Setup, T, inputs, of_matrix_rate, seconds_each
from moesr.runtime.system.relative_error import relative_l2
from moesr.training.config import AutoencoderConfig, ModelConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet, operators
from moesr.training.networks.refinement import AFFFilter

EXPERTS = ((0, 250), (250, 500), (500, 750), (750, 1000))
ROLES = ("expert_0", "decoder")
SMALL = 64  # widths below this number of channels get a small network
PRECISION = torch.float16

COPIED_BYTES, SIDE = 1 << 30, 8192
"""Size of the copy, and of the matrices, from which the limits of a GPU are measured."""

Call = Callable[..., Tensor]


def config_of(setup: Setup) -> ModelConfig:
    """Return the published model's configuration with the sizes of `setup`; a small width shrinks more."""
    unet = UNetConfig(width=setup.width, space_experts=1)
    decoder = AutoencoderConfig(channels=setup.channels)
    if setup.width < SMALL:
        few: dict[str, Any] = {"norm_groups": 8, "res_blocks": 1}
        unet = replace(unet, channel_mult=(1, 1, 1, 2), head_channels=16, **few)
        decoder = replace(decoder, codebook_size=64, filter_blocks=4, fusion_blocks=1, fusion_growth=8, **few)
    return ModelConfig(name="gpu", unet=unet, decoder=decoder, expert_ranges=EXPERTS)


@functools.cache
def networks(setup: Setup) -> tuple[DenoisingUNet, Autoencoder]:
    """Build one expert, used in place of all four, and the decoder, with weights that keep feature scales."""
    config = config_of(setup)
    assert config.unet
    torch.manual_seed(0)
    made = DenoisingUNet(config.unet).eval(), Autoencoder(config.decoder).eval()
    with torch.no_grad():
        for network in made:
            for parameter in network.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return made


def tensors(setup: Setup, device: str, batch: int = 1) -> dict[str, tuple[Tensor, ...]]:
    """Return the float32 inputs of both networks by role; all tiles of a batch are equal."""
    given = inputs(setup.tile)

    def repeated(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device).expand(batch, *array.shape).contiguous()

    images = {name: given[name].transpose(2, 0, 1) for name in ("cond", "lr")}
    unit = {name: image / np.float32(127.5) - np.float32(1) for name, image in images.items()}
    z, t = repeated(given["z"]), torch.full((batch,), float(T), device=device)
    return {"expert_0": (z, repeated(unit["cond"]), t), "decoder": (z, repeated(unit["lr"]))}


def reference(setup: Setup) -> dict[str, np.ndarray]:
    """Return the networks' results on the host in float32, by role; they are computed once and cached."""
    if not setup.reference.is_file():
        expert, decoder = networks(
            setup
        )  # outside of inference mode, so that their weights are ordinary tensors
        given = tensors(setup, "cpu")
        with torch.inference_mode():
            found = {"expert_0": expert(*given["expert_0"]), "decoder": decoder.decode(*given["decoder"])}
        setup.reference.parent.mkdir(parents=True, exist_ok=True)
        np.savez(setup.reference, **{role: value[0].numpy() for role, value in found.items()})
    with np.load(setup.reference) as stored:
        return dict(stored)


@functools.cache
def macs_of(setup: Setup) -> dict[str, int]:
    """Count the multiply-accumulates of a step and a decode of one tile on fake tensors."""
    config = config_of(setup)
    assert config.unet
    with FakeTensorMode():
        expert, decoder = DenoisingUNet(config.unet).eval(), Autoencoder(config.decoder).eval()
        side = setup.tile // 4
        latent, image, t = torch.empty(1, 3, side, side), torch.empty(1, 3, 4 * side, 4 * side), torch.ones(1)
        runs = (lambda: expert(latent, latent, t)), (lambda: decoder.decode(latent, image))
        pairs = zip((expert, decoder), runs, strict=True)
        return {role: macs.total(macs.count(*pair)) for role, pair in zip(ROLES, pairs, strict=True)}


def half(setup: Setup, device: str) -> tuple[DenoisingUNet, Autoencoder]:
    """Return the networks on a device, channels last, in half precision except codebook and AFF filters."""
    torch.backends.cudnn.benchmark = True
    lower = (network.to(device, PRECISION) for network in networks(setup))
    made = tuple(network.to(memory_format=torch.channels_last) for network in lower)  # type: ignore[call-overload]
    for module in made[1].modules():
        if isinstance(module, (nn.Embedding, AFFFilter)):
            module.float()
    networks.cache_clear()  # the cached networks were converted in place
    return made  # type: ignore[return-value]


def calls(setup: Setup, device: str) -> dict[str, Call]:
    """Return step and decode in half precision with float32 inputs and outputs, by role."""
    expert, decoder = half(setup, device)

    def wrap(function: Call) -> Call:
        def run(*given: Tensor) -> Tensor:
            lower = PRECISION is not torch.float32
            with torch.no_grad(), torch.autocast(device, PRECISION, enabled=lower):
                return function(*given).float()

        return run

    return {"expert_0": wrap(expert), "decoder": wrap(lambda z, lr, fidelity=1.0: decoder.decode(z, lr))}


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Within a `with` block, run networks without our kernels."""
    known = operators.has_kernels
    operators.has_kernels = lambda x: False
    try:
        yield
    finally:
        operators.has_kernels = known


def sync_of(device: str) -> Callable[[], object]:
    """Return a function that waits for a device."""
    return torch.cuda.synchronize if device == "cuda" else (lambda: None)


def graphed(call: Call, given: tuple[Tensor, ...], device: str) -> Callable[[], Tensor]:
    """Capture a call on fixed inputs as a CUDA graph; on a CPU, return the call itself."""
    if device != "cuda":
        return lambda: call(*given)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            out = call(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = call(*given)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def device_of() -> str:
    """Return "cuda"; raises Absent if PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        raise Absent(f"PyTorch {torch.__version__} sees no GPU")
    return "cuda"


def measure_limits(setup: Setup, report: Report) -> None:
    """Measure the copy rate and the matrix rate, which the other figures are compared with."""
    import json

    device = device_of()
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target, side = torch.empty_like(source), SIDE
    seconds = seconds_each(lambda: target.copy_(source), sync_of(device))
    bytes_per_s = 2 * source.numel() / seconds
    a, b = torch.randn(2, side, side, dtype=torch.float16, device=device)
    flops_per_s = 2 * side**3 / seconds_each(lambda: torch.mm(a, b), sync_of(device))
    setup.limits.parent.mkdir(parents=True, exist_ok=True)
    setup.limits.write_text(json.dumps({"bytes_per_s": bytes_per_s, "flops_per_s": flops_per_s}))
    report.row("PyTorch", f"copy of {COPIED_BYTES >> 20} MiB, read and written", bytes_per_s / 1e12, "TB/s")
    report.row("PyTorch", f"product of {SIDE}-wide fp16 matrices", flops_per_s / 1e12, "TFLOP/s")


def check(report: Report, who: str, results: Mapping[str, Tensor], setup: Setup) -> None:
    """Compare a step and a decode with the results on the host."""
    from gpu_suite.setup import TOLERANCE

    want = reference(setup)
    for role, value in results.items():
        report.check(f"{who}: {role}", relative_l2(value[0].cpu().numpy(), want[role]), TOLERANCE)


def image(calls: Mapping[str, Callable[[], Tensor]], z: Tensor, steps: int) -> Tensor:
    """Sample and decode one batch; `z` changes in place, since the inputs of `calls` are fixed."""
    for _ in range(steps):
        z.mul_(0.98).add_(calls["expert_0"](), alpha=0.02)
    return calls["decoder"]()


def measure(setup: Setup, report: Report, who: str, made: Mapping[str, Call], device: str) -> None:
    """Check against the host, then time step, decode and image at every batch size as CUDA graphs."""
    sync, work = sync_of(device), macs_of(setup)
    reference(setup)  # computed now, so that it does not count as time of the first image
    for batch in setup.batches:
        began, given = time.perf_counter(), tensors(setup, device, batch)
        runs = {role: graphed(made[role], given[role], device) for role in ROLES}
        prepared, z = time.perf_counter() - began, given["expert_0"][0]
        if batch == setup.batches[0]:
            check(report, who, {role: run() for role, run in runs.items()}, setup)
        for steps in setup.steps:
            start = time.perf_counter()
            image(runs, z, steps)
            sync()
            taken = time.perf_counter() - start
            if batch == setup.batches[0] and steps == setup.steps[0]:
                report.row(who, f"first image of {steps} steps", prepared + taken, "s")
            report.row(who, f"image of {steps} steps", 1e3 * taken / batch, "ms each", batch)
        for role, what in zip(ROLES, ("step", "decode"), strict=True):
            seconds = seconds_each(runs[role], sync)
            share = of_matrix_rate(setup, work[role] * batch, seconds)
            report.row(who, what, 1e3 * seconds, "ms", batch, **share)
    memory_row(report, who, device)


def memory_row(report: Report, who: str, device: str) -> None:
    """Report the GPU memory that is in use."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        report.row(who, "memory of the GPU in use", (total - free) / 1e9, "GB")


def measure_eager(setup: Setup, report: Report) -> None:
    """Measure plain PyTorch in float16, eager and as CUDA graphs."""
    device = device_of()
    plain(setup, report, device)


def plain(setup: Setup, report: Report, device: str) -> None:
    """Measure plain PyTorch in float16 on the given device, eager and as CUDA graphs."""
    with without_kernels():
        made = calls(setup, device)
        given = tensors(setup, device)
        for role, what in zip(ROLES, ("step", "decode"), strict=True):
            seconds = seconds_each(lambda role=role: made[role](*given[role]), sync_of(device))
            report.row("PyTorch fp16, eager", what, 1e3 * seconds, "ms")
        measure(setup, report, "PyTorch fp16, CUDA graphs", made, device)


def measure_kernels_inside(setup: Setup, report: Report) -> None:
    """Measure PyTorch in float16 with our kernels in the networks, as CUDA graphs."""
    device = device_of()
    measure(setup, report, "PyTorch fp16 with our kernels", calls(setup, device), device)


def measure_compiled(setup: Setup, report: Report, device: str = "") -> None:
    """Measure `torch.compile` with its own CUDA graphs at as many batch sizes as time allows."""
    device = device or device_of()
    who, work = "torch.compile fp16", macs_of(setup)
    with without_kernels():
        made = calls(setup, device)
        for batch in setup.batches:
            given = tensors(setup, device, batch)
            for role, what in zip(ROLES, ("step", "decode"), strict=True):
                start = time.perf_counter()
                call = torch.compile(made[role], mode="reduce-overhead", dynamic=False)
                call(*given[role])
                sync_of(device)()
                if batch == setup.batches[0]:
                    report.row(who, f"compiling a {what}", time.perf_counter() - start, "s")
                    check(report, who, {role: call(*given[role]).clone()}, setup)
                seconds = seconds_each(lambda c=call, g=given[role]: c(*g), sync_of(device))
                share = of_matrix_rate(setup, work[role] * batch, seconds)
                report.row(who, what, 1e3 * seconds, "ms", batch, **share)
    memory_row(report, who, device)
