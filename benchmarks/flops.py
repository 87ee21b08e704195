"""Count parameters and multiply-accumulates of MoE-SR, latent diffusion and StableSR (the paper's Table 6).

The networks are built without memory and run once with hooks, so every figure is counted from the layers. A
multiply-accumulate (MAC) is what the paper calls a "FLOP". There are three conventions:

  paper      convolutions and linear layers; the attention products, the products and FFTs of the frequency
             filter, the codebook search and the LR encoder of MoE-SR are left out
  full       all of these are counted; an FFT of N points counts 5 N log2 N real operations, two per MAC, and
             the whole LR encoder is counted, as the published code runs it (see the parts of the total)
  published  StableSR as in the paper's table, counted by the tool `thop`: the text encoder in every step,
             without its attention, and four operations per element of the UNet's LayerNorms; parameters
             without CFW

No convention counts activations, other norms and element-wise products. StableSR encodes its LR image once
and its text once, which the first two conventions include in the total.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import benchlib.missing_extra  # noqa: F401
import torch
from benchlib.macs import PAPER_KINDS, Counts, count, layer_norms, total
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import MoesrError, UsageError
from moesr.runtime.system.json_dataclass import build, read_json
from moesr.training.config import AutoencoderConfig, ModelConfig, StableSRConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet, StableSRUNet, StructureEncoder, TextEncoder

TILE_PX, STEPS = 512, 200  # as in the paper's table
TERA = 1e12

Convention = Literal["paper", "full", "published"]


@dataclass(frozen=True)
class Row:
    """One line of the table, for an image of `tile` x `tile` pixels; `step_t` and `total_t` in 1e12 MACs."""

    model: str
    params_m: float
    step_t: float
    total_t: float
    convention: Convention
    tile: int
    steps: int


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs of one step, one decode (with its part of the LR encoder) and a whole encoding."""

    unet_params: int
    decoder_params: int
    step: Counts
    decode: Counts
    encoder: Counts

    def row(self, model: str, experts: int, convention: Convention, tile: int, steps: int) -> Row:
        """Return the table's line for a model with `experts` UNets and one autoencoder."""
        kinds = PAPER_KINDS if convention == "paper" else None
        step, image = (
            total(self.step, kinds),
            total(self.decode, kinds) - total(self.decode, kinds, "encoder."),
        )
        if convention == "full" and total(self.decode, under="encoder."):
            image += total(self.encoder)
        params = experts * self.unet_params + self.decoder_params
        total_t = (steps * step + image) / TERA
        return Row(model, params / 1e6, step / TERA, total_t, convention, tile, steps)


def measure(unet: UNetConfig, decoder: AutoencoderConfig, tile: int) -> Cost:
    """Build both networks on fake tensors; count one step, one decode and one encoding at `tile` pixels."""
    # Fake tensors, not the meta device, because the frequency filter uses autocast of its device.
    with FakeTensorMode():
        network, first_stage = DenoisingUNet(unet).eval(), Autoencoder(decoder).eval()
        z, image = (
            torch.empty(1, 3, tile // decoder.factor, tile // decoder.factor),
            torch.empty(1, 3, tile, tile),
        )
        step = count(network, lambda: network(z, z, torch.empty(1)))
        decode = count(first_stage, lambda: first_stage.decode(z, image))
        encoder = count(first_stage, lambda: first_stage.encoder(image))
    return Cost(_params(network), _params(first_stage), step, decode, encoder)


@dataclass(frozen=True)
class StableSRCost:
    """Parameters by network, and MACs of one step (UNet and structure encoder) and of the other networks."""

    params: dict[str, int]
    fusion_params: int
    step: Counts
    text: Counts
    encode: Counts
    decode: Counts  # without the LR features, which encoding makes
    layer_norms: int  # operations of the LayerNorms in one step

    def row(self, convention: Convention, tile: int, steps: int) -> Row:
        """Return the table's line in one of the conventions."""
        kinds, params = None if convention == "full" else PAPER_KINDS, sum(self.params.values())
        step, once = total(self.step, kinds), total(self.encode, kinds) + total(self.decode, kinds)
        if convention == "published":
            step += self.layer_norms + sum(n for (name, _), n in self.text.items() if ".mlp." in name)
            params -= self.fusion_params
        else:
            once += total(self.text, kinds)
        total_t = (steps * step + once) / TERA
        return Row("StableSR", params / 1e6, step / TERA, total_t, convention, tile, steps)


def measure_stablesr(config: StableSRConfig, tile: int) -> StableSRCost:
    """Build StableSR's networks on fake tensors; count one step and the other networks at `tile` pixels."""
    with FakeTensorMode(), torch.no_grad():
        unet, structure = StableSRUNet(config.unet).eval(), StructureEncoder(config.structure).eval()
        text, first_stage = TextEncoder(config.text).eval(), Autoencoder(config.decoder).eval()
        side = tile // config.decoder.factor
        z, image, t = torch.empty(1, 4, side, side), torch.empty(1, 3, tile, tile), torch.empty(1)
        ids = torch.zeros(1, config.text.tokens, dtype=torch.int64)
        features, prompt = structure(z, t), text(ids)
        step = count(structure, lambda: structure(z, t)) + count(unet, lambda: unet(z, t, features, prompt))
        norms = count(unet, lambda: unet(z, t, features, prompt), layer_norms)
        encoded = count(text, lambda: text(ids))
        encode = count(first_stage, lambda: first_stage.sample(image, z))
        decode = _without_encoder(count(first_stage, lambda: first_stage.decode(z, image)))
    networks = {
        "UNet": unet,
        "structure encoder": structure,
        "text encoder": text,
        "autoencoder": first_stage,
    }
    params = {name: _params(network) for name, network in networks.items()}
    fusion = sum(_params(layer) for layer in first_stage.decoder.fusions.values())
    return StableSRCost(params, fusion, step, encoded, encode, decode, total(norms))


def _without_encoder(counts: Counts) -> Counts:
    return Counter({key: n for key, n in counts.items() if not key[0].startswith("encoder.")})


def _params(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def measure_all(tile: int) -> tuple[Cost, Cost, StableSRCost]:
    """Measure plain latent diffusion, MoE-SR x4 and StableSR at full width, with merged space experts."""
    config = ModelConfig()
    assert config.unet is not None
    plain = replace(config.decoder, fusion_level=None, refinement="none")
    return (
        measure(replace(config.unet, space_experts=0), plain, tile),
        measure(replace(config.unet, space_experts=1), config.decoder, tile),
        measure_stablesr(StableSRConfig(), tile),
    )


def rows(ldm: Cost, moe: Cost, stablesr: StableSRCost, tile: int, steps: int) -> list[Row]:
    """Return Table 6 in the convention "paper", all models in "full", and StableSR in "published"."""
    experts = len(ModelConfig().expert_ranges)
    counted = [
        row
        for convention in ("paper", "full")
        for row in (
            ldm.row("LDM", 1, convention, tile, steps),
            moe.row("MoE-SR", experts, convention, tile, steps),
            stablesr.row(convention, tile, steps),
        )
    ]
    return [*counted, stablesr.row("published", tile, steps)]


def parts(moe: Cost) -> dict[str, float]:
    """Break down MoE-SR's MACs, in 1e12: one step, one decode without the LR encoder, and the LR encoder."""
    fusion, refinement = "decoder.fusion_layer", "decoder.unet_1"
    own = _without_encoder(moe.decode)
    macs = {
        "step: conv and linear": total(moe.step, PAPER_KINDS),
        "step: attention products": total(moe.step, ("attention",)),
        "step": total(moe.step),
        "decode: conv and linear": total(own, PAPER_KINDS),
        "decode: of these, fusion": total(own, PAPER_KINDS, fusion),
        "decode: of these, refinement network": total(own, PAPER_KINDS, refinement),
        "decode: attention products": total(own, ("attention",)),
        "decode: filter products": total(own, ("filter",)),
        "decode: codebook search": total(own, ("codebook",)),
        "decode without FFTs": total(own) - total(own, ("fft",)),
        "decode: FFTs": total(own, ("fft",)),
        "LR encoder, whole": total(moe.encoder),
        "LR encoder, the part decoding needs": total(moe.decode, under="encoder."),
    }
    return {name: n / TERA for name, n in macs.items()}


def engine_row(directory: Path, steps: int) -> Row:
    """Return the line of an exported engine from the MACs in its manifest, for one tile."""
    m = read_manifest(directory, verify=False)
    params = sum(graph.params for graph in m.graphs.values())
    step = m.graphs[m.experts[0].graph].macs
    decode = m.graphs[DECODER].macs if DECODER in m.graphs else 0
    total_t = (steps * step + decode) / TERA
    return Row(f"engine {m.name}", params / 1e6, step / TERA, total_t, "full", m.tile, steps)


def read_model(path: Path, tile: int) -> ModelConfig:
    """Read a model's configuration; UsageError if it cannot be read or does not fit the tile."""
    try:
        config = build(ModelConfig, read_json(path), strict=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a model's configuration ({error})") from error
    if config.unet is None or config.decoder.embed_dim != 3:
        raise UsageError(f"{path}: expected a model with sampling experts and latents of 3 channels")
    if tile < 1 or tile % config.tile_multiple:
        raise UsageError(f"--tile {tile}: expected a multiple of {config.tile_multiple} for {config.name}")
    return config


def model_cost(config: ModelConfig, tile: int) -> Cost:
    """Measure the model of a configuration that `read_model` returned."""
    assert config.unet
    return measure(config.unet, config.decoder, tile)


def decoder_lines(name: str, cost: Cost, moe: Cost) -> list[str]:
    """Compare a decoder with MoE-SR's: its MACs with the part of the LR encoder that decoding needs."""
    ours, theirs = total(cost.decode), total(moe.decode)
    return [
        "",
        f"decode of {name}: {ours / TERA:.4f}, of MoE-SR {theirs / TERA:.4f} (1e12, with the LR features), "
        f"{theirs / ours:.1f} times fewer; {cost.decoder_params / 1e6:.2f} million parameters",
    ]


def table(table_rows: Sequence[Row]) -> str:
    """Format the rows as aligned text."""
    width = max(len("model"), *(len(row.model) for row in table_rows))
    lines = [f"{'model':{width}}  convention  params (M)  step (T)  total (T)  tile (px)  steps"]
    lines += [
        f"{r.model:{width}}  {r.convention:10}  {r.params_m:10.2f}  {r.step_t:8.4f}  {r.total_t:9.2f}"
        f"  {r.tile:9d}  {r.steps:5d}"
        for r in table_rows
    ]
    return "\n".join(lines)


def text(table_rows: Sequence[Row], ldm: Cost, moe: Cost, stablesr: StableSRCost) -> str:
    """Return the table, the sums of parameters, and the breakdown of MoE-SR."""
    summed = " + ".join(f"{name} {n / 1e6:.2f}" for name, n in stablesr.params.items())
    experts, tile, moe_parts = len(ModelConfig().expert_ranges), table_rows[0].tile, parts(moe)
    width = max(map(len, moe_parts))
    lines = [
        table(table_rows),
        "",
        f"params (M): LDM = UNet {ldm.unet_params / 1e6:.2f} + autoencoder {ldm.decoder_params / 1e6:.2f}, "
        f"MoE-SR = {experts} x {moe.unet_params / 1e6:.2f} + {moe.decoder_params / 1e6:.2f},",
        f"StableSR = {summed} (of which CFW {stablesr.fusion_params / 1e6:.2f})",
        "",
        f"MoE-SR at {tile} px, 1e12 multiply-accumulates",
    ]
    return "\n".join([*lines, *(f"  {name:{width}}  {macs:9.6f}" for name, macs in moe_parts.items())])


def _tile(text: str) -> int:
    config = StableSRConfig()  # its multiple is also valid for the other models
    multiple = config.unet.factor * config.decoder.factor
    if not text.isdecimal() or int(text) < multiple or int(text) % multiple:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected output pixels, a positive multiple of {multiple}"
        )
    return int(text)


def _steps(text: str) -> int:
    limit = ModelConfig().schedule.timesteps
    if not text.isdecimal() or not 1 <= int(text) <= limit:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a number of sampling steps from 1 to {limit}"
        )
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table or JSON; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tile", type=_tile, default=TILE_PX, help="output pixels per side (default %(default)s)"
    )
    parser.add_argument("--steps", type=_steps, default=STEPS, help="sampling steps (default %(default)s)")
    parser.add_argument("--engine", type=Path, metavar="DIR", help="add the line of an exported engine")
    parser.add_argument(
        "--model", type=Path, metavar="FILE", help="add a model by its configuration, as in a checkpoint's"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    args = parser.parse_args(argv)
    try:
        extra = [engine_row(args.engine, args.steps)] if args.engine else []
        config = read_model(args.model, args.tile) if args.model else None
    except MoesrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    costs = measure_all(args.tile)
    cost = model_cost(config, args.tile) if config else None
    if config and cost:
        counted: tuple[Convention, ...] = ("paper", "full")
        sizes = args.tile, args.steps
        extra += [cost.row(config.name, len(config.expert_ranges), each, *sizes) for each in counted]
    table_rows = [*rows(*costs, args.tile, args.steps), *extra]
    if args.json:
        report: dict[str, Any] = {"rows": [asdict(r) for r in table_rows], "parts_t": parts(costs[1])}
        print(json.dumps(report, indent=1))
        return 0
    print(text(table_rows, *costs))
    if config and cost:
        print("\n".join(decoder_lines(config.name, cost, costs[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
