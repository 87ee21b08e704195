"""The command `moesr-import` after its arguments are parsed: the import and its printed summary."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from moesr.runtime.errors import UsageError
from moesr.runtime.system import console
from moesr.training.checkpoint import Checkpoint
from moesr.training.config import AutoencoderConfig, StableDiffusionConfig, StableSRConfig, VaeConfig
from moesr.training.importing.moe_sr import Imported, Published, import_published
from moesr.training.importing.stable_diffusion import PublishedDiffusion, import_diffusion
from moesr.training.importing.stablesr import PublishedStableSR, import_stablesr
from moesr.training.importing.vae import PublishedVae, import_vae, is_vae
from moesr.training.networks import Autoencoder, DenoisingUNet
from moesr.training.weights import meta_network, networks


def run(args: argparse.Namespace) -> int:
    """Import the files that the arguments name and print a summary."""
    _check_files_named(args)
    files = 2 if args.stablesr else len(args.stable_diffusion or [*args.experts, args.decoder])
    dtype, scale = torch.float16 if args.fp16 else torch.float32, args.scale or 4
    common = {
        "name": args.name,
        "norm_groups": args.norm_groups,
    }
    if args.head_channels is not None:
        common["head_channels"] = args.head_channels
    with console.bar(args.quiet, total=files, desc="import", unit="file") as bar:
        options = {"dtype": dtype, "force": args.force, "on_file": lambda path: bar.update()}
        if args.stable_diffusion:
            diffusion = PublishedDiffusion(tuple(args.stable_diffusion), prediction=args.prediction, **common)
            lines = diffusion_summary(import_diffusion(diffusion, args.output, **options), diffusion)
        elif args.stablesr:
            stablesr = PublishedStableSR(args.stablesr, args.cfw, scale, prediction=args.prediction, **common)
            lines = stablesr_summary(import_stablesr(stablesr, args.output, **options), stablesr)
        elif not args.experts and is_vae(args.decoder):
            if args.scale is not None:
                raise UsageError(f"{args.decoder}: is an autoencoder without a scale; leave out --scale")
            vae = PublishedVae(args.decoder, args.name, args.latent_scale, args.norm_groups)
            lines = vae_summary(import_vae(vae, args.output, **options), vae)
        elif args.latent_scale is not None:
            raise UsageError(f"{args.decoder}: has no latents to scale; leave out --latent-scale")
        else:
            source = Published(args.decoder, tuple(args.experts), scale, **common)
            lines = summary(import_published(source, args.output, **options), source)
    if not args.quiet:
        for line in lines:
            console.say(line)
    return 0


def _check_files_named(args: argparse.Namespace) -> None:
    """Raise UsageError unless the files belong to one family of models and are complete."""
    others = [f"--{o}" for o in ("experts", "decoder") if getattr(args, o)]
    if args.stable_diffusion:
        others += [f"--{o}" for o in ("stablesr", "cfw") if getattr(args, o)]
        if others:
            raise UsageError(f"got --stable-diffusion and {others[0]}, expected the files of one model")
        return
    stablesr = [f"--{o}" for o in ("stablesr", "cfw", "prediction") if getattr(args, o) is not None]
    if stablesr and others:
        raise UsageError(f"got {stablesr[0]} and {others[0]}, expected the files of one model")
    if stablesr and not (args.stablesr and args.cfw):
        raise UsageError(f"got {', '.join(stablesr)}; StableSR needs both --stablesr FILE and --cfw FILE")
    if args.latent_scale is not None and (stablesr or args.experts):
        raise UsageError("--latent-scale is for an autoencoder on its own; leave it out")
    if not stablesr and not args.decoder:
        raise UsageError(
            "got no autoencoder; add --decoder FILE, or --stablesr FILE and --cfw FILE, or "
            "--stable-diffusion PATH"
        )


def stablesr_summary(checkpoint: Checkpoint, source: PublishedStableSR) -> list[str]:
    """Return lines that name the networks of StableSR, their source files and the written directory."""
    config = checkpoint.config
    assert isinstance(config, StableSRConfig)
    params = {part: _millions(meta_network(*network)) for part, network in networks(config).items()}
    unet = config.unet
    return [
        f"UNet: {params['expert']}, width {unet.width}, multipliers {unet.channel_mult}, predicts "
        f"{config.prediction}, from {source.model}",
        f"structure encoder: {params['structure']}, width {config.structure.width}",
        f"text encoder: {params['text']}, width {config.text.width}, {config.text.layers} layers",
        f"decoder: {params['decoder']}, {_autoencoder(config.decoder)}, from {source.cfw}",
        f"wrote {checkpoint.directory} ({config.name}, x{config.scale}, {config.steps} steps)",
    ]


def diffusion_summary(checkpoint: Checkpoint, source: PublishedDiffusion) -> list[str]:
    """Return lines that name Stable Diffusion's networks, their source files and the written directory."""
    config = checkpoint.config
    assert isinstance(config, StableDiffusionConfig)
    params = {part: _millions(meta_network(*network)) for part, network in networks(config).items()}
    return [
        f"UNet: {params['expert']}, width {config.unet.width}, multipliers {config.unet.channel_mult}, "
        f"predicts {config.prediction}, from {', '.join(map(str, source.files))}",
        f"text encoder: {params['text']}, width {config.text.width}, {config.text.layers} layers",
        f"autoencoder: {params['decoder']}, {_autoencoder(config.decoder)}",
        f"wrote {checkpoint.directory}, from which moesr-train structure starts",
    ]


def vae_summary(checkpoint: Checkpoint, source: PublishedVae) -> list[str]:
    """Return lines that name the autoencoder, its source and the written directory."""
    config = checkpoint.config
    assert isinstance(config, VaeConfig)
    params = _millions(meta_network(*networks(config)["decoder"]))
    what = "autoencoder" if config.encoder else "decoder without an encoder"
    return [
        f"{what}: {params}, {_autoencoder(config.decoder)}, from {source.path}",
        f"wrote {checkpoint.directory} ({config.name}, scaling factor {config.latent_scale:g})",
    ]


def summary(imported: Imported, source: Published) -> list[str]:
    """Return lines that name the experts and the decoder, their source files and the written directory."""
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
        schedule, scale = config.schedule, imported.facts.latent_scale
        scaled = f", latents scaled by {scale:g}" if scale != 1.0 else ""
        lines.append(
            f"schedule: {schedule.timesteps} timesteps, betas {schedule.beta_start:g} to "
            f"{schedule.beta_end:g}{scaled}"
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
    levels = " and ".join(map(str, config.fusion_levels))
    fusion = f"LR fusion at level {levels}" if levels else "no LR fusion"
    return (
        f"{codes}, 1/{config.factor}, {config.channels} channels, multipliers {config.channel_mult}, "
        f"{config.res_blocks} residual blocks, {fusion}, refinement {config.refinement}"
    )


def _millions(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"
