"""The whole way from an LR image to its result as one graph: condition, unrolled sampler, decoder, colors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from moesr.export.graphs import open_sizes
from moesr.export.graphs.builder import BuiltGraph, GraphBuilder, Value
from moesr.export.lowering import Lowering
from moesr.export.single.image_nodes import TOP, fix_color, scalar
from moesr.export.single.networks import Family
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.sampling.schedule import StepTable

INPUT, OUTPUT = "input", "output"
"""The names that ComfyUI's TensorRT upscaler expects; other tools take the first input and output."""

LATENT = "latent"
"""The name of the clean latent between the sampler and the decoder, at which the proof cuts the graph."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, which the file holds as constants."""

    table: StepTable
    sampler: str  # the name of the sampler that made the table
    seed: int
    fidelity: float
    color_fix: str
    open_sizes: bool = False  # the file takes LR images of other sizes, too


def single_graph(
    family: Family, recipe: Recipe, height: int, width: int, lowering: Lowering
) -> tuple[BuiltGraph, str]:
    """Write the graph for LR images of `height` x `width`; returns it and the name of the sampler's result.

    With open sizes these are only the size for which shapes are stated, and at which the noise is that of the
    runtime; for larger images the noise repeats.

    Its input is [1, 3, h, w] RGB in [0, 1], its output [1, 3, s h, s w] RGB in [0, 1], both float32. An
    Identity node named LATENT stands between the sampler and the decoder.
    """
    g = GraphBuilder("single", lowering, open_sizes=recipe.open_sizes)
    levels = g.op("Mul", g.input(INPUT, (1, 3, height, width)), scalar(g, TOP))
    with g.scope("enlarge"):
        lr = family.enlarged(g, levels)
    with g.scope("condition"):
        cond = family.condition(g, levels, lr, recipe.seed)
    z = sample(g, family, recipe, cond)
    image = family.decoded(g, g.renamed(z, LATENT), lr, recipe.fidelity)
    with g.scope("colors"):
        image = fix_color(g, image, lr, recipe.color_fix)
    half = scalar(g, 0.5)
    image = g.op("Clip", g.op("Add", g.op("Mul", image, half), half), scalar(g, 0.0), scalar(g, 1.0))
    g.output(OUTPUT, image)
    built = g.finish()
    if recipe.open_sizes:
        _open(built.model)
    return built, z.name


def _open(model: onnx.ModelProto) -> None:
    """Declare height and width of the input and the output as open."""
    for value, prefix in ((model.graph.input[0], ""), (model.graph.output[0], "output_")):
        for axis, name in ((2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[axis].dim_param = prefix + name


def sample(g: GraphBuilder, family: Family, recipe: Recipe, cond: Value) -> Value:
    """Write all steps of the sampler, from noise to the clean latent."""
    table, config = recipe.table, family.config
    shape = (family.first_stage.embed_dim, cond.size(2), cond.size(3))

    def drawn(position: int, deviation: np.floating | float = 1.0) -> Value:
        values = noise.gaussian(recipe.seed, position, shape)[None] * np.float32(deviation)
        return open_sizes.cover(g, values, cond) if g.open_sizes else g.constant(values)

    z, history = drawn(noise.INITIAL_NOISE), None
    if family.starts_from_latent:
        signal = float(config.schedule.alpha_bar[-1])
        z = weighted(g, [(np.sqrt(1.0 - signal), z), (np.sqrt(signal), cond)])
    for step in range(len(table)):
        with g.scope(f"step_{step}"):
            c = samplers.coefficients(table, step, config.prediction)
            out = g.float32(family.predict(g, z, cond, int(table.expert[step]), float(table.t[step])))
            terms = [(c.c_z, z), (c.c_out, out)]
            if history is not None:
                terms.append((c.c_history, history))
            if table.extrapolation.any():
                history = weighted(g, [(c.x_z, z), (c.x_out, out)])
            if c.c_noise:
                terms.append((np.float32(1.0), drawn(table.first + step, c.c_noise)))
            z = weighted(g, terms)
    return z


def weighted(g: GraphBuilder, terms: Iterable[tuple[np.floating, Value]]) -> Value:
    """Write a weighted sum, without the terms of weight 0."""
    total: Value | None = None
    for weight, value in terms:
        if weight == 0:
            continue
        part = value if weight == 1 else g.op("Mul", value, scalar(g, float(weight)))
        total = part if total is None else g.op("Add", total, part)
    assert total is not None, "a sum needs a term"
    return total
