"""What `moesr-import` does once its arguments are read: the import, and a summary of what was found."""

from __future__ import annotations

import argparse

from moesr.runtime import console
from moesr.training.config import AutoencoderConfig
from moesr.training.import_published import Imported, Published, import_published
from moesr.training.networks import Autoencoder, DenoisingUNet
from moesr.training.weights import meta_network


def run(args: argparse.Namespace) -> int:
    """Import the files that the arguments name and print what was found."""
    source = Published(
        decoder=args.decoder,
        experts=tuple(args.experts),
        scale=args.scale,
        name=args.name,
        head_channels=args.head_channels,
        norm_groups=args.norm_groups,
        trust_pickle=args.trust_pickle,
    )
    files = len(source.experts) + 1
    with console.bar(args.quiet, total=files, desc="import", unit="file") as bar:
        imported = import_published(source, args.output, force=args.force, on_file=lambda path: bar.update())
    console.say("\n".join(summary(imported, source)))
    return 0


def summary(imported: Imported, source: Published) -> list[str]:
    """Lines that say what was found in which file, and where it went."""
    config = imported.checkpoint.config
    lines = []
    if imported.unet is not None and config.unet is not None:
        unet = imported.unet
        params = _millions(meta_network(DenoisingUNet, config.unet))
        attention = ", ".join(f"1/{factor}" for factor in unet.attention_factors)
        moe = f"{unet.space_experts} space experts merged" if unet.space_experts else "no space experts"
        lines.append(
            f"experts: {len(source.experts)} x {params}, width {unet.width}, "
            f"multipliers {unet.channel_mult}, {unet.res_blocks} residual blocks, "
            f"attention at {attention or 'the middle only'}, {moe}"
        )
        for k, (path, ema) in enumerate(zip(source.experts, imported.ema, strict=True)):
            t_from, t_to = config.expert_ranges[k]
            lines.append(
                f"  expert {k}: t {t_from}..{t_to - 1} from {path}, {'EMA' if ema else 'raw'} weights"
            )
    params = _millions(meta_network(Autoencoder, config.decoder))
    lines += [f"decoder: {params}, {_autoencoder(config.decoder)}, from {source.decoder}"]
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
