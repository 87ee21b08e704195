"""Count parameters and multiply-accumulates of MoE-SR and plain latent diffusion (the paper's Table 6).

The networks are built without memory and run once under hooks, so every figure is counted from the layers;
only StableSR's row is quoted. In two conventions, a multiply-accumulate (MAC) being the paper's "FLOP":

  paper  convolutions and linear layers; the attention products, the products and FFTs of the frequency
         filter, the codebook search and the LR encoder are left out
  full   all of these; an FFT of N points counts 5 N log2 N real operations, two to a MAC, and the LR encoder
         counts whole, as the published code runs it (the parts say how much of it decoding needs)

Activations, norms and element-wise products count in neither.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moesr.runtime.contract import DECODER
from moesr.runtime.errors import MoesrError
from moesr.runtime.manifest import Manifest
from moesr.training.config import AutoencoderConfig, ModelConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet, SpaceMoE
from moesr.training.networks.autoencoder import AttnBlock, VectorQuantiser
from moesr.training.networks.refinement import AFFFilter
from moesr.training.networks.unet import AttentionBlock

PAPER_KINDS = ("conv", "linear")
TILE_PX, STEPS = 512, 200  # of the paper's table
TERA = 1e12

Counts = Counter[tuple[str, str]]  # (module name, kind) -> MACs


@dataclass(frozen=True)
class Row:
    """One line of the table; `step_t` and `total_t` in 1e12 MACs, an image of `tile` x `tile` pixels."""

    model: str
    params_m: float
    step_t: float
    total_t: float
    convention: Literal["paper", "full"]
    source: Literal["counted", "published"]
    tile: int
    steps: int


PUBLISHED = Row("StableSR", 1409.11, 0.4162, 86.27, "paper", "published", TILE_PX, STEPS)  # paper Table 6


def count(network: nn.Module, call: Callable[[], object]) -> Counts:
    """MACs of `call`, which runs `network`, by module name and kind of operation."""
    counts: Counts = Counter()

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for kind, macs in _macs(module, inputs[0], output).items():
                counts[name, kind] += macs

        return add

    handles = [m.register_forward_hook(hook(name)) for name, m in network.named_modules()]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return counts


def _macs(module: nn.Module, x: Tensor, output: Tensor) -> dict[str, int]:
    """MACs that a module does itself, outside the modules it calls."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return {"conv": output.numel() * module.weight[0].numel()}
    if isinstance(module, nn.Linear):
        return {"linear": output.numel() * module.in_features}
    if isinstance(module, SpaceMoE):  # one merged FFN over the tokens, called as functions
        tokens = x.numel() // x.shape[1]
        return {"linear": tokens * sum(w.numel() for w in module.mean_weights() if w.ndim == 2)}
    if isinstance(module, (AttentionBlock, AttnBlock)):  # q k^T, then times v
        return {"attention": 2 * x.numel() * math.prod(x.shape[2:])}
    if isinstance(module, VectorQuantiser):
        return {"codebook": x.numel() * module.embedding.num_embeddings}
    if isinstance(module, AFFFilter):
        batch, channels, height, width = x.shape
        points, bins = height * width, height * (width // 2 + 1)
        layers = sum(w.numel() for w in (module.w1, module.w2))  # real and imaginary, each used twice
        transforms = 2 * batch * channels  # there and back
        return {
            "filter": 2 * batch * bins * layers,
            "fft": round(transforms * 5 * points * math.log2(points) / 2),
        }
    return {}


def total(counts: Counts, kinds: Sequence[str] | None = None, under: str = "") -> int:
    """Sum the MACs of some kinds (None: all) in modules whose name starts with `under`."""
    return sum(
        n for (name, kind), n in counts.items() if name.startswith(under) and (not kinds or kind in kinds)
    )


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs of one step, one decode (with the LR encoder it needs) and one whole encoding."""

    unet_params: int
    decoder_params: int
    step: Counts
    decode: Counts
    encoder: Counts

    def row(
        self, model: str, experts: int, convention: Literal["paper", "full"], tile: int, steps: int
    ) -> Row:
        """The table's line for a model of `experts` UNets and one autoencoder."""
        kinds = PAPER_KINDS if convention == "paper" else None
        step, image = (
            total(self.step, kinds),
            total(self.decode, kinds) - total(self.decode, kinds, "encoder."),
        )
        if convention == "full" and total(self.decode, under="encoder."):
            image += total(self.encoder)
        params = experts * self.unet_params + self.decoder_params
        total_t = (steps * step + image) / TERA
        return Row(model, params / 1e6, step / TERA, total_t, convention, "counted", tile, steps)


def measure(unet: UNetConfig, decoder: AutoencoderConfig, tile: int) -> Cost:
    """Build both networks on fake tensors; count one step, one decode and one encoding at `tile` pixels."""
    # Fake tensors rather than the bare meta device: the frequency filter asks its device about autocast.
    with FakeTensorMode():
        network, first_stage = DenoisingUNet(unet).eval(), Autoencoder(decoder).eval()
        z, image = (
            torch.empty(1, 3, tile // decoder.factor, tile // decoder.factor),
            torch.empty(1, 3, tile, tile),
        )
        step = count(network, lambda: network(z, z, torch.empty(1)))
        decode = count(first_stage, lambda: first_stage.decode(z, image))
        encoder = count(first_stage, lambda: first_stage.encoder(image))
    params = [sum(p.numel() for p in m.parameters()) for m in (network, first_stage)]
    return Cost(params[0], params[1], step, decode, encoder)


def measure_all(tile: int) -> tuple[Cost, Cost]:
    """(plain latent diffusion, MoE-SR x4) at full width, space experts merged as for inference."""
    config = ModelConfig()
    assert config.unet is not None
    plain = replace(config.decoder, fusion_level=None, refinement="none")
    return (
        measure(replace(config.unet, space_experts=0), plain, tile),
        measure(replace(config.unet, space_experts=1), config.decoder, tile),
    )


def rows(ldm: Cost, moe: Cost, tile: int, steps: int) -> list[Row]:
    """Table 6 in the paper's convention, then the counted models in full."""
    experts = len(ModelConfig().expert_ranges)
    counted = {
        convention: [
            ldm.row("LDM", 1, convention, tile, steps),
            moe.row("MoE-SR", experts, convention, tile, steps),
        ]
        for convention in ("paper", "full")
    }
    return [*counted["paper"], PUBLISHED, *counted["full"]]


def parts(moe: Cost) -> dict[str, float]:
    """Where MoE-SR's MACs go, in 1e12: one step, one decode without its LR encoder, and the LR encoder."""
    fusion, refinement = "decoder.fusion_layer", "decoder.unet_1"
    own = Counter({key: n for key, n in moe.decode.items() if not key[0].startswith("encoder.")})
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
    """The line of an exported engine, from its manifest: the MACs of its graphs, for one tile."""
    m = Manifest.read(directory, verify=False)
    params = sum(graph.params for graph in m.graphs.values())
    step = m.graphs[m.experts[0].graph].macs
    decode = m.graphs[DECODER].macs if DECODER in m.graphs else 0
    total_t = (steps * step + decode) / TERA
    return Row(f"engine {m.name}", params / 1e6, step / TERA, total_t, "full", "counted", m.tile, steps)


def table(table_rows: Sequence[Row]) -> str:
    """Aligned text, one line a row."""
    width = max(len("model"), *(len(row.model) for row in table_rows))
    lines = [f"{'model':{width}}  convention  params (M)  step (T)  total (T)  tile (px)  steps  source"]
    lines += [
        f"{r.model:{width}}  {r.convention:10}  {r.params_m:10.2f}  {r.step_t:8.4f}  {r.total_t:9.2f}"
        f"  {r.tile:9d}  {r.steps:5d}  {r.source}"
        for r in table_rows
    ]
    return "\n".join(lines)


def text(table_rows: Sequence[Row], ldm: Cost, moe: Cost) -> str:
    """The table, the sums of parameters behind it, and MoE-SR's parts."""
    experts, tile, moe_parts = len(ModelConfig().expert_ranges), table_rows[0].tile, parts(moe)
    width = max(map(len, moe_parts))
    lines = [
        table(table_rows),
        "",
        f"params (M): LDM = UNet {ldm.unet_params / 1e6:.2f} + autoencoder {ldm.decoder_params / 1e6:.2f}, "
        f"MoE-SR = {experts} x {moe.unet_params / 1e6:.2f} + {moe.decoder_params / 1e6:.2f}",
        "",
        f"MoE-SR at {tile} px, 1e12 multiply-accumulates",
    ]
    return "\n".join([*lines, *(f"  {name:{width}}  {macs:9.6f}" for name, macs in moe_parts.items())])


def _tile(text: str) -> int:
    config = ModelConfig()
    assert config.unet is not None
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
    """Print the table, or JSON; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tile", type=_tile, default=TILE_PX, help="output pixels of a side (default %(default)s)"
    )
    parser.add_argument("--steps", type=_steps, default=STEPS, help="sampling steps (default %(default)s)")
    parser.add_argument("--engine", type=Path, metavar="DIR", help="add the line of an exported engine")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    args = parser.parse_args(argv)
    try:
        extra = [engine_row(args.engine, args.steps)] if args.engine else []
    except MoesrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    ldm, moe = measure_all(args.tile)
    table_rows = [*rows(ldm, moe, args.tile, args.steps), *extra]
    if args.json:
        report: dict[str, Any] = {"rows": [asdict(r) for r in table_rows], "parts_t": parts(moe)}
        print(json.dumps(report, indent=1))
        return 0
    print(text(table_rows, ldm, moe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
