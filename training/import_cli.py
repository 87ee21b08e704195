"""Import published weights as a checkpoint directory that moesr-export reads.

Sizes are inferred from the weights. Experts are given with the lowest noise first; the exponential moving
average is used where a file has one. Without --experts the result is a decoder on its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from moesr.runtime.errors import MoesrError
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.import_published import Imported, import_published
from moesr.training.networks import Autoencoder, DenoisingUNet
from moesr.training.weights import meta_network


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-import`: 0 done, 1 a file cannot be used or written, 2 usage."""
    args = parser().parse_args(argv)
    files = [*args.experts, args.decoder]
    try:
        with tqdm(total=len(files), desc="import", unit="file", file=sys.stderr, disable=None) as bar:
            imported = import_published(
                args.experts,
                args.decoder,
                args.output,
                scale=args.scale,
                name=args.name,
                head_channels=args.head_channels,
                norm_groups=args.norm_groups,
                force=args.force,
                trust_pickle=args.trust_pickle,
                on_file=lambda path: bar.update(),
            )
    except MoesrError as error:
        print(f"moesr-import: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("moesr-import: interrupted, nothing was written", file=sys.stderr)
        return 130
    print("\n".join(summary(imported, args.experts, args.decoder)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser("moesr-import", description=__doc__, formatter_class=_HelpFormatter)
    add = p.add_argument
    add(
        "--experts",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="weights of each sampling expert, lowest noise first; one file: a plain latent diffusion model",
    )
    add(
        "--decoder",
        type=Path,
        required=True,
        metavar="FILE",
        help="weights of the autoencoder, or a whole latent diffusion model",
    )
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="checkpoint directory to write")
    add("--scale", type=int, choices=(4, 8), default=4, help="upscaling factor the model was trained for")
    add("--name", metavar="NAME", help="name of the model (default: made from its kind and scale)")
    add(
        "--head-channels",
        type=_positive,
        default=UNetConfig.head_channels,
        metavar="N",
        help="channels of an attention head, which the weights do not tell",
    )
    add(
        "--norm-groups",
        type=_positive,
        default=UNetConfig.norm_groups,
        metavar="N",
        help="groups of every GroupNorm, which the weights do not tell",
    )
    add("--force", action="store_true", help="replace an existing checkpoint directory")
    add(
        "--trust-pickle",
        action="store_true",
        help="load files that hold more than tensors; these can run any code",
    )
    return p


def summary(imported: Imported, experts: Sequence[Path], decoder: Path) -> list[str]:
    """Lines that say what was found in which file, and where it went."""
    config = imported.checkpoint.config
    lines = []
    if imported.unet is not None and config.unet is not None:
        unet = imported.unet
        params = _millions(meta_network(DenoisingUNet, config.unet))
        attention = ", ".join(f"1/{factor}" for factor in unet.attention_factors)
        moe = f"{unet.space_experts} space experts merged" if unet.space_experts else "no space experts"
        lines.append(
            f"experts: {len(experts)} x {params}, width {unet.width}, multipliers {unet.channel_mult}, "
            f"{unet.res_blocks} residual blocks, attention at {attention or 'the middle only'}, {moe}"
        )
        for k, (path, ema) in enumerate(zip(experts, imported.ema, strict=True)):
            t_from, t_to = config.expert_ranges[k]
            lines.append(
                f"  expert {k}: t {t_from}..{t_to - 1} from {path}, {'EMA' if ema else 'raw'} weights"
            )
    params = _millions(meta_network(Autoencoder, config.decoder))
    lines += [f"decoder: {params}, {_autoencoder(config.decoder)}, from {decoder}"]
    return [*lines, f"wrote {imported.checkpoint.directory} ({config.name}, x{config.scale})"]


def _autoencoder(config: AutoencoderConfig) -> str:
    """Describe the sizes of an autoencoder."""
    codes = (
        f"VQ {config.codebook_size} x {config.embed_dim}"
        if config.codebook_size
        else f"KL {config.embed_dim}"
    )
    fusion = "no LR fusion" if config.fusion_level is None else f"LR fusion at level {config.fusion_level}"
    return (
        f"{codes}, 1/{config.factor}, {config.channels} channels, multipliers {config.channel_mult}, "
        f"{config.res_blocks} residual blocks, {fusion}, refinement {config.refinement}"
    )


def _millions(network: Autoencoder | DenoisingUNet) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default in (None, [], False):
            return action.help
        return super()._get_help_string(action)


if __name__ == "__main__":
    sys.exit(main())
