"""Time the decoder of a configuration against MoE-SR's at full width, with random weights, in ONNX Runtime.

Both decoders become graphs by the export's code and run one tile on the CPU in turns. The figures are
seconds, medians of the rounds after a first run that is not counted. Random weights cost what trained ones
cost; they say nothing about quality.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import benchlib.missing_extra  # noqa: F401
import numpy as np
import onnxruntime as ort
import torch
from benchlib.machine import machine_line
from flops import read_model

from moesr.export import parity
from moesr.export.graphs.decoder import decoder_graph
from moesr.runtime.errors import MoesrError, UsageError
from moesr.training.config import AutoencoderConfig
from moesr.training.networks import Autoencoder

TERA = 1e12


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        config = read_model(args.model, args.tile)
        if args.rounds < 1 or args.threads < 1:
            raise UsageError("--rounds and --threads start at 1")
    except MoesrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(machine_line(), file=sys.stderr)
    models = {"MoE-SR": AutoencoderConfig(), config.name: config.decoder}
    opened = {name: Opened(sizes, args.tile, args.threads) for name, sizes in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    for one in opened.values():
        one.run()
    for _ in range(args.rounds):
        for name, one in opened.items():
            seconds[name].append(one.run())
    print("| decoder | parameters (M) | 1e12 MACs in the graph | file (MB) | seconds | fewer MACs | faster |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    first = opened["MoE-SR"]
    for name, one in opened.items():
        taken, slowest = median(seconds[name]), median(seconds["MoE-SR"])
        print(
            f"| {name} | {one.params / 1e6:.2f} | {one.macs / TERA:.4f} | {one.nbytes / 1e6:.1f} "
            f"| {taken:.2f} | {first.macs / one.macs:.1f} | {slowest / taken:.1f} |"
        )
    return 0


class Opened:
    """A decoder with random weights as an open session, and its inputs for one tile."""

    def __init__(self, sizes: AutoencoderConfig, tile: int, threads: int) -> None:
        torch.manual_seed(0)
        latent_px = tile // sizes.factor
        with torch.inference_mode():
            network = Autoencoder(sizes).eval()
            built = decoder_graph(network, latent_px)
            self._inputs = parity.decoder_inputs(network, latent_px)
        self.params, self.macs = sum(p.numel() for p in network.parameters()), built.macs
        data = built.to_bytes()
        self.nbytes = len(data)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self) -> float:
        """Decode one tile and return the seconds that it took."""
        begun = time.perf_counter()
        (image,) = self._session.run(None, self._inputs)
        taken = time.perf_counter() - begun
        if not np.isfinite(np.asarray(image)).all():
            raise RuntimeError("the decoder's result is not finite")
        return taken


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).parent / "models" / "light_decoder.json",
        metavar="FILE",
        help="configuration of a model, as in a checkpoint (default: models/light_decoder.json)",
    )
    p.add_argument("--tile", type=int, default=128, help="output pixels per side (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="counted runs of each (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    return p


if __name__ == "__main__":
    sys.exit(main())
