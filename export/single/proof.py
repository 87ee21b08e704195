"""Proves that one file computes the same as the runtime's sampler with PyTorch networks.

The quantiser in front of the decoder is discontinuous: a latent half-way between two codes may go either way
after the smallest rounding. Therefore the proof cuts the graph at the clean latent. The sampler's result is
compared with that of the same steps in PyTorch, and the decoder's result for latents near codes (see
`parity.decoder_inputs`) with that of the network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from moesr.export import parity
from moesr.export.lowering import Lowering
from moesr.export.single.graph import INPUT, LATENT, OUTPUT, Recipe
from moesr.export.single.networks import Family, unit_tensor
from moesr.runtime.engine.graph_spec import Parity
from moesr.runtime.images import color
from moesr.runtime.images.resize import imresize
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.system.files import scratch_directory

SEED = 1
COARSE = 8  # pixels along a side of the noise that becomes the test image when it is enlarged


def seeded_image(height: int, width: int) -> np.ndarray:
    """Return an LR image of soft areas with noise, uint8 [height, width, 3].

    The noise is strong and the levels are far from white and black, so that there are no flat regions, which
    the runtime corrects in another way.
    """
    rng = np.random.Generator(np.random.PCG64(SEED))
    soft = imresize(rng.integers(90, 166, (COARSE, COARSE, 3), np.uint8), height, width).astype(np.int16)
    return (soft + rng.integers(-40, 41, soft.shape)).astype(np.uint8)


@torch.inference_mode()
def prove(
    path: Path, latent: str, family: Family, recipe: Recipe, height: int, width: int, lowering: Lowering
) -> tuple[Parity, Parity]:
    """Return the errors of the file's clean latent, whose name is `latent`, and of its image.

    ParityError is raised if one of them exceeds the lowering's threshold.
    """
    image, config = seeded_image(height, width), family.config
    given = parity.decoder_inputs(family.autoencoder, height * config.scale // family.first_stage.factor)["z"]
    given = given * np.float32(family.latent_scale)
    lr = unit_tensor(enlarged(image, family))
    inputs = {INPUT: np.float32(image.transpose(2, 0, 1)[None] / 255.0), LATENT: given}
    sampled, decoded = _run_cut(path, latent, inputs)
    want = sampled_by_networks(family, recipe, image, lr)
    errors = parity.judge(path, sampled, want.numpy(), lowering)
    want = family.run_decoder(torch.from_numpy(given), lr, recipe.fidelity)
    fixed = _corrected(want[0].numpy(), lr[0].numpy(), recipe.color_fix)
    return errors, parity.judge(path, decoded[0], np.clip(fixed / 2 + 0.5, 0, 1), lowering)


def enlarged(image: np.ndarray, family: Family) -> np.ndarray:
    """Return the LR image at output size, with 16 bits if the training images were not rounded to 8."""
    matlab = family.convention == "matlab"
    deep = image if matlab else image.astype(np.uint16) * np.uint16(257)
    sides = (side * family.config.scale for side in image.shape[:2])
    return imresize(deep, *sides, convention=family.convention)


def _corrected(image: np.ndarray, lr: np.ndarray, method: str) -> np.ndarray:
    correct = {"adain": color.adain, "wavelet": color.wavelet}.get(method)
    return correct(image, lr) if correct else image


def sampled_by_networks(family: Family, recipe: Recipe, image: np.ndarray, lr: Tensor) -> Tensor:
    """Return the clean latent of an LR image, by the runtime's sampler and noise and PyTorch networks."""
    table, config = recipe.table, family.config
    cond = family.run_condition(image, lr, recipe.seed)
    shape = (family.first_stage.embed_dim, *cond.shape[2:])
    z = noise.gaussian(recipe.seed, noise.INITIAL_NOISE, shape)
    if family.starts_from_latent:
        signal = float(config.schedule.alpha_bar[-1])
        z = np.float32(np.sqrt(1.0 - signal)) * z + np.float32(np.sqrt(signal)) * cond[0].numpy()
    history, scratch = (np.zeros_like(z) for _ in range(2))
    for step in range(len(table)):
        out = family.run_expert(
            torch.from_numpy(z)[None], cond, int(table.expert[step]), float(table.t[step])
        )
        added = noise.gaussian(recipe.seed, table.first + step, shape)
        c = samplers.coefficients(table, step, config.prediction)
        samplers.advance(z, out[0].numpy(), added, c, scratch, history if table.extrapolation.any() else None)
    return torch.from_numpy(z)[None]


def _run_cut(path: Path, latent: str, inputs: parity.Inputs) -> list[np.ndarray]:
    """Run a file that is cut at its clean latent: its results are the sampler's and the decoder's."""
    model = onnx.load(path)
    graph = model.graph
    graph.node.remove(next(node for node in graph.node if list(node.output) == [LATENT]))
    graph.input.append(helper.make_tensor_value_info(LATENT, TensorProto.FLOAT, inputs[LATENT].shape))
    graph.output.insert(0, helper.make_tensor_value_info(latent, TensorProto.FLOAT, inputs[LATENT].shape))
    assert [value.name for value in graph.output] == [latent, OUTPUT]
    with scratch_directory(path.parent) as scratch:
        cut = scratch / path.name
        cut.write_bytes(model.SerializeToString())
        del model, graph
        return parity.outputs(cut, inputs)
