"""Proves that a graph computes the same as its network: ONNX Runtime against float32 PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.export.bfloat16 import as_bf16, without_bf16
from moesr.export.lowering import Lowering
from moesr.runtime.backends.ort import session_options
from moesr.runtime.engine.graph_spec import Parity
from moesr.runtime.errors import EngineError
from moesr.runtime.system.relative_error import relative_l2
from moesr.training.config import AutoencoderConfig, StableSRConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

THRESHOLDS = {
    ("fp32", "fp32"): 1e-4,
    ("fp32", "fp16"): 5e-3,
    ("fp16", "fp16"): 1e-2,
    ("bf16", "fp16"): 5e-2,
    ("bf16", "bf16"): 5e-2,
}
"""Bounds on the relative L2 error, by the precision of a graph and of its stored weights.

Errors measured from width 32 to full size: float32 has 1e-6 to 1e-5 (the largest in the decoder at 512 px,
whose norms over large groups amplify rounding). Half precision has about 1e-3, nearly all of it from rounding
the weights. bf16 has 5e-3, and 4e-2 in decoders with a codebook, where another code may become the nearest.
"""

UNSEEN = 3.0
"""The bound for int8, in units of the intended error, which may double on images that were not recorded."""

SLACK = 4.0
"""The bound for a graph's inner features, in units of the bound for its result.

int8 layers are chosen by the error of the result alone. In a network with random weights the features had an
error of 4e-2 and the result one of 1.5e-2.
"""

SEED = 0
EXPERT_BATCH = 2  # more than one, to show that the batch size is free and images do not affect one another

Inputs = dict[str, np.ndarray]


class ParityError(EngineError):
    """A graph does not reproduce its network closely enough; nothing was published."""


def expert_inputs(network: DenoisingUNet, latent_px: int, t_range: tuple[int, int]) -> Inputs:
    """Return seeded inputs of an expert: noise, a condition in [-1, 1], its first and its last timestep."""
    rng, config = np.random.Generator(np.random.PCG64(SEED)), network.config
    size = (latent_px, latent_px)
    z_t = rng.standard_normal((EXPERT_BATCH, config.out_channels, *size), np.float32)
    cond = rng.uniform(-1, 1, (EXPERT_BATCH, config.in_channels - config.out_channels, *size)).astype(
        np.float32
    )
    return {"z_t": z_t, "cond": cond, "t": np.array([t_range[0], t_range[1] - 1], np.float32)}


def stablesr_inputs(config: StableSRConfig, latent_px: int, prompts: int) -> Inputs:
    """Return seeded inputs of StableSR's expert: noise, a latent, first and last timestep, prompt indices."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    shape = (EXPERT_BATCH, config.unet.in_channels, latent_px, latent_px)
    z_t, cond = (rng.standard_normal(shape, np.float32) for _ in range(2))
    inputs = {"z_t": z_t, "cond": cond, "t": np.array([0, config.schedule.timesteps - 1], np.float32)}
    return inputs | ({"prompt": np.arange(prompts, dtype=np.float32)} if prompts > 1 else {})


def encoder_inputs(config: AutoencoderConfig, latent_px: int) -> Inputs:
    """Return seeded inputs of an encoder: an image in [-1, 1], and noise."""
    rng, side = np.random.Generator(np.random.PCG64(SEED)), latent_px * config.factor
    image = rng.uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
    return {"image": image, "noise": rng.standard_normal((1, config.embed_dim, *[latent_px] * 2), np.float32)}


def decoder_inputs(network: Autoencoder, latent_px: int) -> Inputs:
    """Return seeded inputs of a decoder: a latent near codes and, if it is conditioned, an LR image, fidelity
    1.

    The quantiser is discontinuous: a latent half-way between two codes may go either way after the smallest
    rounding, and the resulting difference of the image would say nothing about the graph. Therefore each
    position lies well inside the cell of its code, at a quarter of the distance to the nearest other code and
    in a random direction. Rounding cannot change its code, so a code that differs is a true error.
    """
    rng, config = np.random.Generator(np.random.PCG64(SEED)), network.config
    shape = (1, config.embed_dim, latent_px, latent_px)
    z = rng.standard_normal(shape, np.float32)
    if config.codebook_size:
        codes = network.quantize.embedding.weight.detach()
        chosen = torch.from_numpy(rng.integers(0, len(codes), latent_px * latent_px))
        z = _near(codes, chosen, rng).T.reshape(shape)
    inputs, side = {"z": np.ascontiguousarray(z)}, latent_px * config.factor
    if config.takes_lr:
        inputs["lr"] = rng.uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
    if network.decoder.fusions:
        inputs["fidelity"] = np.ones(1, np.float32)
    return inputs


def _near(codes: Tensor, chosen: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Return points [N, D] at a quarter of the distance from chosen codes to their nearest neighbors."""
    unique, inverse = torch.unique(chosen, return_inverse=True)
    distance = torch.cdist(codes[unique].double(), codes.double())
    distance[distance == 0] = torch.inf  # the code itself, and codes that training left identical
    radius = distance.min(dim=1).values[inverse].numpy() / 4
    radius = np.where(np.isfinite(radius), radius, 0.0)  # a codebook with a single code
    direction = rng.standard_normal((len(chosen), codes.shape[1]))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return (codes[chosen].numpy() + radius[:, None] * direction).astype(np.float32)


@torch.inference_mode()
def network_output(network: nn.Module, inputs: Inputs) -> np.ndarray:
    """Run the float32 network on a graph's inputs, with GroupNorm computed in float64.

    PyTorch's float32 GroupNorm loses digits on a CPU when groups are large. In a decoder of 32 channels at
    512 px it alone causes an error of 1e-3, where float64 leaves 1e-6. That error is not the graph's.
    """
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    if "fidelity" in tensors:  # one value per tile
        tensors["fidelity"] = tensors["fidelity"][:, None, None, None]
    with double_norms(network):
        run = network.decode if isinstance(network, Autoencoder) else network
        return run(*tensors.values()).numpy()


@contextmanager
def double_norms(network: nn.Module) -> Iterator[None]:
    """Compute every GroupNorm of a network in float64 inside the block; see `network_output`."""
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    handles = [norm.register_forward_hook(_double_norm) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _double_norm(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return a forward hook that replaces the output of a GroupNorm by that of float64 arithmetic."""
    assert isinstance(norm, nn.GroupNorm)
    weight, bias = norm.weight.double(), norm.bias.double()
    return F.group_norm(inputs[0].double(), norm.num_groups, weight, bias, norm.eps).to(output.dtype)


def outputs(model: Path | bytes, inputs: Inputs, backend: str = "onnxruntime") -> list[np.ndarray]:
    """Run a graph on the CPU with one of BACKENDS and return all its outputs in order."""
    return BACKENDS[backend](model, inputs)


def _onnxruntime(model: Path | bytes, inputs: Inputs) -> list[np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, inputs)]


BACKENDS: dict[str, Callable[[Path | bytes, Inputs], list[np.ndarray]]] = {"onnxruntime": _onnxruntime}


def prove(
    path: Path,
    inputs: Inputs,
    want: np.ndarray,
    lowering: Lowering,
    backend: str = "onnxruntime",
    further: Sequence[np.ndarray] = (),
) -> Parity:
    """Run a graph file and compare it with `want`, its network's result for `inputs`.

    `further` are the network's results for the other outputs, which have a wider bound. A bf16 graph is
    replaced by its float32 twin that rounds to bf16. ParityError is raised if an error exceeds the lowering's
    threshold.
    """
    if lowering.precision == "bf16":
        twin = path.with_name(f"twin_of_{path.name}")  # in the same directory, to share its weight files
        rounded = without_bf16 if lowering.values == "bf16" else as_bf16
        twin.write_bytes(rounded(onnx.load(path, load_external_data=False)).SerializeToString())
        try:
            got = outputs(twin, inputs, backend)
        finally:
            twin.unlink()
    else:
        got = outputs(path, inputs, backend)
    for value, wanted in zip(got[1:], further, strict=True):
        judge(path, value, wanted, lowering, SLACK)
    return judge(path, got[0], want, lowering)


def judge(path: Path, got: np.ndarray, want: np.ndarray, lowering: Lowering, slack: float = 1.0) -> Parity:
    """Return the error of a graph's result; ParityError if it exceeds `slack` times the threshold."""
    limit = slack * threshold(lowering)
    if got.shape != want.shape:
        raise ParityError(
            f"{path.name}: output shape {got.shape}, the network's is {want.shape}; please report this"
        )
    if not np.isfinite(want).all():
        raise ParityError(f"{path.name}: the network's own result is not finite; train it again")
    error = relative_l2(got, want)
    if not error <= limit:  # NaN fails too
        raise ParityError(
            f"{path.name}: relative L2 error {error:.2e} against the float32 network, at most "
            f"{limit:.0e} is accepted for {_words(lowering)}; nothing was published; {_cure(lowering)}"
        )
    return Parity(error, float(np.abs(got.astype(np.float64) - want).max()), limit)


def threshold(lowering: Lowering) -> float:
    """Return the largest accepted relative L2 error of a lowering."""
    if lowering.precision == "int8":
        return UNSEEN * lowering.int8_error
    return THRESHOLDS[lowering.precision, lowering.store]


def _words(lowering: Lowering) -> str:
    stored = f" stored as {lowering.store}" if lowering.store != lowering.precision else ""
    return lowering.precision + stored


def _cure(lowering: Lowering) -> str:
    if lowering.precision == "int8":
        return (
            "calibrate on more photographs (--calibrate), accept more (--int8-error), or export in float32 "
            "(without --int8)"
        )
    if lowering.precision in ("fp16", "bf16"):
        return f"export in float32 (without --{lowering.precision})"
    return "export with --store fp32" if lowering.store == "fp16" else "please report this"
