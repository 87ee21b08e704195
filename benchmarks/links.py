"""Find the weakest link of a model: measure the loss of each part on held-out photographs.

  python benchmarks/links.py --model runs/demo-x4/decoder/checkpoint \\
      --first-stage runs/demo-x4/autoencoder/checkpoint -o benchmarks/results/demo-x4-links.md

The chain is: the first stage encodes the original to a latent, the experts sample such a latent from the LR
image, and the decoder turns it into an image. The first table has PSNR and the power above the LR image's
Nyquist frequency (1: the original's) for several latents in place of the sampled one. The second table has
the error of each expert's x0 by timestep, as a fraction of the latents' variance, and for comparison the
error of an estimate from the LR image alone (x0 at the last timestep, when z_t is noise). A model whose
decoder was trained as a whole does not contain its first stage; without --first-stage the links that need it
are left out. Only the middle of each image is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
import numpy as np
import torch
from benchlib import metrics
from benchlib.image_pairs import load_originals
from benchlib.origin import origin_line
from benchlib.tables import grid
from torch import Tensor

from moesr.runtime.errors import MoesrError, UsageError
from moesr.runtime.images.resize import imresize
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.training.checkpoint import Checkpoint, expert_count, load_checkpoint
from moesr.training.data.crops import to_float
from moesr.training.losses.diffusion import add_noise, predict_x0, sample
from moesr.training.networks import Autoencoder
from moesr.training.seeded_random import SAMPLING, SampleRng

Link = tuple[str, list[float], list[float]]  # name of the latent, PSNR and power by image
PER_EXPERT = 3  # timesteps of each expert's range that are measured


@dataclass(frozen=True)
class Pair:
    """An original, its LR image, and the LR image enlarged by bicubic interpolation, uint8 [H, W, 3]."""

    hr: np.ndarray
    lr: np.ndarray
    enlarged: np.ndarray


def pairs(source: str, scale: int, side: int) -> list[Pair]:
    """Load the originals in `source`, cropped to their middle of at most `side` pixels per side."""
    found = []
    for image in load_originals(source).values():
        height, width = (min(side, size // 32 * 32) for size in image.shape[:2])
        top, left = ((size - kept) // 2 for size, kept in zip(image.shape, (height, width), strict=False))
        hr = np.ascontiguousarray(image[top : top + height, left : left + width])
        lr = imresize(hr, height // scale, width // scale)
        found.append(Pair(hr, lr, imresize(lr, height, width)))
    return found


def tensor(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W] in [-1, 1]."""
    return to_float(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])


def pixels(image: Tensor) -> np.ndarray:
    """[1, 3, H, W] in about [-1, 1] -> uint8 [H, W, 3]."""
    return ((image[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Chain:
    """A model's networks, and the first stage if it is given."""

    model: Checkpoint
    decoder: Autoencoder
    first: Autoencoder | None

    @property
    def decoders(self) -> dict[str, float | None]:
        """The fidelities to decode with, by name; only one, None, if the decoder fuses no LR features."""
        if not self.decoder.config.fusion_levels:
            return {"decoder": None}
        values = dict.fromkeys((0.0, self.model.config.fidelity, 1.0))
        return {f"decoder at fidelity {w:g}": w for w in values}

    def condition(self, pair: Pair) -> Tensor:
        """Return the LR image on the latent grid, [1, 3, h, w]."""
        factor = self.model.config.decoder.factor
        return tensor(imresize(pair.lr, *(side // factor for side in pair.hr.shape[:2])))

    def sampled(self, conditions: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Sample a latent for every condition with the model's sampler and steps."""
        config = self.model.config
        table = SAMPLERS[config.sampler].table(config.schedule, config.steps, config.expert_ranges)
        experts = [self.model.expert(k) for k in range(expert_count(config))]
        return [
            sample(experts, cond, table, SampleRng(seed, SAMPLING, [i]), config.prediction)
            for i, cond in enumerate(conditions)
        ]

    def decode(self, network: Autoencoder, z: Tensor, pair: Pair, fidelity: float | None) -> np.ndarray:
        """Decode a latent with LR features of weight `fidelity`, or without them if it is None."""
        lr = tensor(pair.enlarged) if fidelity is not None or network.config.lr_residual else None
        return pixels(network.decode(z, lr, 0.0 if fidelity is None else fidelity))


def decoded_links(chain: Chain, images: Sequence[Pair], seed: int) -> list[Link]:
    """Measure PSNR and power above the LR band for every latent in place of the sampled one."""
    links: list[Link] = []
    scale, decoders = chain.model.config.scale, chain.decoders
    drawn = chain.sampled([chain.condition(pair) for pair in images], seed)

    def add(name: str, results: Sequence[np.ndarray]) -> None:
        scores = [metrics.scores(sr, pair.hr, scale) for sr, pair in zip(results, images, strict=True)]
        links.append((name, [s["psnr"] for s in scores], [s["high_power"] for s in scores]))

    add("bicubic", [pair.enlarged for pair in images])
    if (first := chain.first) is not None:
        encoded = [first.encode(tensor(pair.hr)) for pair in images]
        cases = zip(encoded, images, strict=True)
        add("encoder's latent, first stage", [chain.decode(first, z, pair, None) for z, pair in cases])
        for decoder, w in decoders.items():
            cases = zip(encoded, images, strict=True)
            results = [chain.decode(chain.decoder, z, pair, w) for z, pair in cases]
            add(f"encoder's latent, {decoder}", results)
    for decoder, w in decoders.items():
        for name, latents in (("sampled latent", drawn), ("zeros", [torch.zeros_like(z) for z in drawn])):
            cases = zip(latents, images, strict=True)
            results = [chain.decode(chain.decoder, z, pair, w) for z, pair in cases]
            add(f"{name}, {decoder}", results)
    return links


def expert_errors(chain: Chain, images: Sequence[Pair], seed: int) -> list[list[str]]:
    """Return the rows of the second table: expert, timestep, error of x0 and of the LR-only estimate."""
    assert chain.first is not None
    config, last = chain.model.config, chain.model.config.schedule.timesteps - 1
    latents = [chain.first.encode(tensor(pair.hr)) for pair in images]
    conditions = [chain.condition(pair) for pair in images]
    variance = float(np.mean([float(z.square().mean()) for z in latents]))

    def error(k: int, at: int) -> float:
        network, t, errors = chain.model.expert(k), torch.tensor([at]), []
        for i, (z, cond) in enumerate(zip(latents, conditions, strict=True)):
            eps = SampleRng(seed, SAMPLING, [i]).normal(*z.shape[1:])
            z_t = add_noise(z, eps, t, config.schedule)
            x0 = predict_x0(z_t, network(z_t, cond, t), t, config.schedule, config.prediction)
            errors.append(float((x0 - z).square().mean()))
        return float(np.mean(errors)) / variance

    alone = error(expert_count(config) - 1, last)
    rows = []
    for k, (low, high) in enumerate(config.expert_ranges):
        for at in np.linspace(low, high - 1, PER_EXPERT).astype(int):
            a = float(config.schedule.alpha_bar[at])
            rows.append([str(k), str(at), f"{a:.4f}", f"{error(k, int(at)):.3f}", f"{alone:.3f}"])
    return rows


def page(args: argparse.Namespace) -> str:
    """Measure all links and describe them in Markdown."""
    model = load_checkpoint(args.model)
    if model.config.unet is None:
        raise UsageError(f"{args.model}: has no experts; give the checkpoint of moesr-train decoder")
    first = None if args.first_stage is None else load_checkpoint(args.first_stage).decoder()
    chain = Chain(model, model.decoder(), first)
    images = pairs(args.hr, model.config.scale, args.side)
    rows = [
        [name, f"{np.mean(psnr):.2f}", f"{np.mean(power):.2f}", f"{np.median(power):.2f}"]
        for name, psnr, power in decoded_links(chain, images, args.seed)
    ]
    config = model.config
    fused = f"default fidelity {config.fidelity:g}" if config.decoder.fusion_levels else "no LR fusion"
    text = (
        f"# Links of {config.name}\n\n{origin_line()}\n\nBicubic x{config.scale} pairs of "
        f"{len(images)} images ({args.hr}), the middle {args.side} px; {config.sampler}, "
        f"{config.steps} steps, {fused}. Checkpoint {model.sha256()[:12]}.\n\n"
        + grid(["What is decoded", "PSNR (dB)", "HF power, mean", "median"], rows)
    )
    if first is None:
        return text + "\n\nThe first stage was not given, so the links that need it are not measured.\n"
    head = ["Expert", "t", "signal's share", "error of x0", "from the LR image alone"]
    return f"{text}\n\n{grid(head, expert_errors(chain, images, args.seed))}\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint of the whole model")
    p.add_argument("--first-stage", type=Path, metavar="DIR", help="checkpoint of moesr-train autoencoder")
    p.add_argument("--hr", default="demo", metavar="DIR", help="originals (default: three photographs)")
    p.add_argument("--side", type=int, default=256, metavar="PX", help="measured side (default %(default)s)")
    p.add_argument("--seed", type=int, default=42, help="seed of the noise (default %(default)s)")
    p.add_argument("-o", "--out", type=Path, metavar="FILE", help="also write the page to this file")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the page; returns the exit code."""
    args = parse(argv)
    try:
        with torch.inference_mode():
            text = page(args)
    except MoesrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
