"""Stage 2: the LR-conditioned, frequency-compensated decoder (paper section 3.3), on latents from stage 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from moesr.runtime.errors import UsageError
from moesr.training.checkpoint import Checkpoint, StableSRCheckpoint, expert_count
from moesr.training.config import StableSRConfig
from moesr.training.data.crops import Crops, resize_batch, to_float
from moesr.training.loop.fit import Fitted, Run, fit
from moesr.training.loop.validation import psnr
from moesr.training.losses.adversarial import adaptive_weight, hinge_loss
from moesr.training.losses.losses import (
    energy_distance,
    frequency_loss,
    pixel_loss,
    spectrum_distance,
    wavelet_colors,
)
from moesr.training.losses.perceptual import load_lpips
from moesr.training.networks import Autoencoder
from moesr.training.networks.discriminator import PatchDiscriminator
from moesr.training.recipe import DecoderStage, Recipe
from moesr.training.stages import latents
from moesr.training.stages.common import BEST_CHECKPOINT, CHECKPOINT, cpu_state, first_stage_of, publish
from moesr.training.stages.start import add_to_lr, pass_lr
from moesr.training.stages.structure import check_stage_1

LATENTS_NAME, VAL_LATENTS_NAME = "latents", "val_latents"
NEW_PARTS = ("decoder.fusion_layer_", "decoder.unet_1.")
CODES = ("quantize.", "post_quant_conv.")
CRITICISED = 0.75  # in a mixed set, the discriminator gets only results with a fidelity below this
START_CROPS = 6  # number of crops that the last layer's initial weights are fitted to

States = Iterable[dict[str, Tensor]]


class DecoderObjective:
    """Reconstruct HR from stage 1's latents and the LR image, with VQGAN's losses and Eq. 6."""

    def __init__(self, network: Autoencoder, stage: DecoderStage, device: torch.device) -> None:
        self.network, self.stage = network, stage
        self.critic = PatchDiscriminator() if stage.adversarial_weight else None
        self.lpips = load_lpips(stage.lpips_weights, device) if stage.lpips_weight else None
        network.requires_grad_(False)
        for name, parameter in network.named_parameters():
            parameter.requires_grad = is_trained(name, stage, network.config.fusion_levels)

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch (number, HR, LR, latent) and the figures to log.

        In a mixed set a batch also has a flag per sample that is set if the latent is the encoder's. The
        discriminator's own loss is included; its gradient reaches only the discriminator.
        """
        adversarial = self.critic is not None and step >= self.stage.adversarial_from
        last = self.network.decoder.conv_out.weight
        frozen = not last.requires_grad
        last.requires_grad_(not frozen or adversarial)  # the adaptive weight needs the gradient there
        fidelity = self._fidelity(batch)
        decoded, sr, target, _ = self._decode(batch, fidelity)
        reconstruction, figures = self._reconstruction(decoded, sr, target)
        total = reconstruction + frequency_loss(sr, target, self.stage, figures)
        if self.stage.energy_weight:
            figures["energy"] = ((1.0 - fidelity) * energy_distance(sr, target)).mean()
            total = total + self.stage.energy_weight * figures["energy"]
        if self.stage.spectrum_weight:
            figures["spectrum"] = spectrum_distance(sr, target)
            total = total + self.stage.spectrum_weight * figures["spectrum"]
        if adversarial:
            seen = fidelity.flatten() < CRITICISED if self.stage.encoded_share else slice(None)
            if len(sr[seen]):
                total = total + self._adversarial(sr[seen], target[seen], reconstruction, last, figures)
            last.requires_grad_(not frozen)
        return total, figures

    def _fidelity(self, batch: Sequence[Tensor]) -> Tensor:
        """Draw a fidelity per sample, [B, 1, 1, 1]: 0 or 1, or in a mixed set any value between them."""
        drawn = torch.rand(2, len(batch[0]), 1, 1, 1).to(batch[1].device)
        if not self.stage.encoded_share:
            return (drawn[0] >= self.stage.free_share).float()
        encoded = batch[4].reshape(drawn[1].shape)
        # The density of w is 2 (1 - w) for the encoder's latents and 2 w for sampled latents.
        distrust = torch.where(encoded, 1.0 - drawn[1].sqrt(), drawn[1].sqrt())
        return torch.where(drawn[0] < self.stage.free_share, (~encoded).float(), distrust)

    def _decode(
        self, batch: Sequence[Tensor], fidelity: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the decoded image, the same after color correction, HR and the enlarged LR.

        All are [B, 3, P, P] in [-1, 1].
        """
        _, hr, lr, z = batch[:4]
        lr_up = to_float(resize_batch(lr, *hr.shape[-2:])).contiguous(memory_format=torch.channels_last)
        decoded = self.network.decode(z, lr_up, fidelity, quantised=True).float()
        sr = wavelet_colors(decoded, lr_up) if self.stage.wavelet_colors else decoded
        return decoded, sr, to_float(hr), lr_up

    def _reconstruction(
        self, decoded: Tensor, sr: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        figures: dict[str, Tensor] = {}
        total = pixel_loss(sr, target, self.stage, figures, decoded)
        if self.lpips is not None:
            figures["lpips"] = self.lpips(sr, target)
            total = total + self.stage.lpips_weight * figures["lpips"]
        return total, figures

    def _adversarial(
        self, sr: Tensor, target: Tensor, reconstruction: Tensor, last: Tensor, figures: dict[str, Tensor]
    ) -> Tensor:
        """Return the decoder's weighted adversarial loss plus the discriminator's own loss."""
        critic = self.critic
        assert critic is not None
        critic.requires_grad_(False)
        against = -critic(sr).float().mean()
        adaptive = self.stage.adversarial_scaling == "adaptive"
        weight = adaptive_weight(reconstruction, against, last) if adaptive else torch.ones_like(against)
        critic.requires_grad_(True)
        own = hinge_loss(critic(target).float(), critic(sr.detach()).float())
        figures |= {"adv": against, "adv_weight": weight, "critic": own}
        return self.stage.adversarial_weight * weight * against + own

    def after_step(self, step: int) -> None:
        """Delete the gradient that the adaptive weight left at a frozen layer."""
        last = self.network.decoder.conv_out.weight
        if not last.requires_grad:
            last.grad = None

    def evaluate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss without adversarial term, the PSNR in dB, and images: enlarged LR, SR and HR.

        The fidelity is 1, or in a mixed set 0 for the encoder's latents.
        """
        fidelity = (~batch[4]).float()[:, None, None, None] if len(batch) > 4 else 1.0
        decoded, sr, target, lr_up = self._decode(batch, fidelity)
        reconstruction, figures = self._reconstruction(decoded, sr, target)
        total = reconstruction + frequency_loss(sr, target, self.stage, figures)
        return {"loss": total, "psnr": psnr(sr, target), **figures}, torch.cat((lr_up, sr, target), dim=-1)


def is_trained(name: str, stage: DecoderStage, levels: tuple[int, ...]) -> bool:
    """Return True if stage 2 trains the parameter `name`; `levels` are the levels fused with LR features."""
    if name.startswith("decoder."):
        return stage.trainable != "fusion+refinement" or name.startswith(NEW_PARTS)
    if stage.trainable != "decoder+lr" or not levels:
        return False
    last = max(levels)
    before = tuple(f"encoder.down.{i}." for i in range(last))
    return name.startswith(("encoder.conv_in.", *before, f"encoder.down.{last}.block."))


def codes_of(network: Autoencoder) -> dict[str, Tensor]:
    """Return the weights of the first stage that a decoder needs to read its latents."""
    return {k: v for k, v in network.state_dict().items() if k.startswith(CODES)}


def start_from(plain: Autoencoder, network: Autoencoder, *, whole: bool = True) -> None:
    """Copy the first stage's weights and initialize the new parts to pass features through almost unchanged.

    If the first stage is another network, `whole` must be False; then only its codebook is copied.
    """
    given = plain.state_dict() if whole else codes_of(plain)
    network.load_state_dict({**network.state_dict(), **given})
    for fusion in network.decoder.fusions.values():
        # This zeroes every path but the shortcuts of the last blocks, which then pass on only small biases.
        for part in ("encode_enc_1.conv2", "encode_enc_1.conv_out", "encode_enc_3.conv2"):
            nn.init.zeros_(fusion.get_parameter(f"{part}.weight"))
            nn.init.zeros_(fusion.get_parameter(f"{part}.bias"))
    refinement = getattr(network.decoder, "unet_1", None)
    if refinement is not None:
        for block in (refinement.conv1, refinement.up_conv2):
            nn.init.dirac_(block.up_dim.weight)
            nn.init.zeros_(block.up_dim.bias)


def prepare(recipe: Recipe, start: Checkpoint, run: Run, init: Checkpoint | None = None) -> DecoderObjective:
    """Build the objective of this stage for a checkpoint of stage 1, with the decoder of `init` if given.

    Raises UsageError if one of the checkpoints belongs to another model.
    """
    config, model = start.config, recipe.model
    if expert_count(config) != expert_count(model) or config.expert_ranges != model.expert_ranges:
        raise UsageError(
            f"{start.directory}: has experts for {config.expert_ranges if config.unet else 'nothing'}, "
            f"the recipe for {model.expert_ranges}; give the checkpoint of moesr-train experts"
        )
    if isinstance(model, StableSRConfig):
        check_stage_1(start, model)
    torch.manual_seed(recipe.seed)
    network = Autoencoder(model.decoder)
    if init is None:
        start_from(first_stage_of(recipe, start, run).cpu(), network, whole=recipe.first_stage is None)
    elif init.config.decoder == model.decoder:
        codes = codes_of(first_stage_of(recipe, start, run).cpu())
        network.load_state_dict({**init.decoder().state_dict(), **codes})
    else:
        raise UsageError(f"{init.directory}: its decoder is {init.config.decoder}, expected {model.decoder}")
    return DecoderObjective(network, recipe.decoder, run.device)


class StandIns(Dataset[tuple[Tensor, ...]]):
    """Samples like those of `latents.Triples`, but with noise for latents, to measure training steps."""

    def __init__(self, data: Crops, channels: int, factor: int) -> None:
        self.data, self.shape = data, (channels, data.patch_px // factor, data.patch_px // factor)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return the number, HR, LR and a random latent."""
        return *self.data[index], torch.randn(self.shape)


def train(
    recipe: Recipe,
    data: Crops | None,
    run: Run,
    start: Checkpoint,
    held_out: Crops | None = None,
    *,
    made: Path | None = None,
    init: Checkpoint | None = None,
) -> None:
    """Train the decoder and write `run.directory/checkpoint`, the complete model.

    The latents are read from the set `made` if it is given, else made from `data` in `run.directory/latents`.
    The weights start from the decoder of `init` if it is given, else from the first stage.
    """
    objective, stage = prepare(recipe, start, run, init), recipe.decoder
    if made is None:
        if data is None:
            raise UsageError("decoder needs photographs (--data) or latents made from them (--latents)")
        made = run.directory / LATENTS_NAME
        latents.make(recipe, start, data, run, made, stage.latents)
        triples = latents.Triples(made, recipe.seed)
    else:
        triples = latents.open_set(made, recipe, start)
    if stage.trainable == "decoder+lr" and init is None and objective.network.decoder.fusions:
        torch.manual_seed(recipe.seed)  # making latents may have used other numbers in each process
        if objective.network.config.lr_residual:
            add_to_lr(objective.network)
        else:
            pass_lr(objective.network, default_collate([triples[i] for i in range(START_CROPS)]))
    shown = None
    if held_out is not None:
        place = run.directory / VAL_LATENTS_NAME
        latents.make(recipe, start, held_out, run, place, stage.val_samples)
        shown = latents.Triples(place, None)
    fitted = fit(objective, stage, triples, run, "decoder", shown)
    if init is not None and stage.init_share:
        mix = partial(interpolated, others=cpu_state(init.decoder()), share=stage.init_share)
        fitted = Fitted(mix(fitted.last), None if fitted.best is None else mix(fitted.best))
    _publish(fitted, recipe, start, run)


def interpolated(weights: dict[str, Tensor], others: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Interpolate networks: (1 - share) `weights` + share `others` (ESRGAN, Wang et al. 2018, section 3.4).

    Between a decoder trained without the adversarial loss and the same decoder fine-tuned with it, the share
    trades detail against artifacts.
    """
    mixed = {k: v.lerp(others[k], share) for k, v in weights.items() if v.is_floating_point()}
    return {**weights, **mixed}


def _publish(fitted: Fitted, recipe: Recipe, start: Checkpoint, run: Run) -> None:
    dtype = torch.float16 if recipe.decoder.stored == "fp16" else torch.float32
    for place, weights in ((CHECKPOINT, fitted.last), (BEST_CHECKPOINT, fitted.best)):
        if weights is not None:
            experts, others = _kept(start)
            publish(run.directory / place, recipe.model, experts, weights, dtype, others)


def _kept(start: Checkpoint) -> tuple[States, Iterable[tuple[str, dict[str, Tensor]]]]:
    """Return the state dicts of the experts, and of StableSR's other networks by name."""
    if isinstance(start, StableSRCheckpoint):
        others = (("structure", start.structure), ("text", start.text))
        return (cpu_state(start.unet()) for _ in range(1)), ((n, cpu_state(load())) for n, load in others)
    return (cpu_state(start.expert(k)) for k in range(expert_count(start.config))), ()
