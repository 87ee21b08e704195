"""Stage 2: the LR-conditioned, frequency-compensated decoder (paper section 3.3), on latents from stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from moesr.runtime.errors import UsageError
from moesr.training.adversarial import adaptive_weight, hinge_loss
from moesr.training.checkpoint import Checkpoint, expert_count
from moesr.training.data import Crops, resize_batch, to_float
from moesr.training.loop import Fitted, Run, fit
from moesr.training.losses import colour_loss, focal_frequency_loss
from moesr.training.networks import Autoencoder
from moesr.training.networks.discriminator import PatchDiscriminator
from moesr.training.perceptual import load_lpips
from moesr.training.recipe import DecoderStage, Recipe
from moesr.training.stages import latents
from moesr.training.stages.common import BEST_CHECKPOINT, CHECKPOINT, cpu_state, publish
from moesr.training.stages.experts import first_stage_of
from moesr.training.validation import psnr

LATENTS_NAME, VAL_LATENTS_NAME = "latents", "val_latents"
NEW_PARTS = ("decoder.fusion_layer_", "decoder.unet_1.")


class DecoderTask:
    """Reconstruct HR from stage 1's latents and the LR image, by VQGAN's and the frequency loss (Eq. 6)."""

    def __init__(self, network: Autoencoder, stage: DecoderStage, device: torch.device) -> None:
        self.network, self.stage = network, stage
        self.critic = PatchDiscriminator() if stage.adversarial_weight else None
        self.lpips = load_lpips(stage.lpips_weights, device) if stage.lpips_weight else None
        network.requires_grad_(False)
        for name, parameter in network.named_parameters():
            parameter.requires_grad = is_trained(name, stage)

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of (number, HR, LR, latent); the discriminator's own is added and reaches only that."""
        adversarial = self.critic is not None and step >= self.stage.adversarial_from
        last = self.network.decoder.conv_out.weight
        frozen = not last.requires_grad
        last.requires_grad_(not frozen or adversarial)  # the adaptive weight needs the gradient there
        sr, target, _ = self._decode(batch)
        reconstruction, figures = self._reconstruction(sr, target)
        total = reconstruction + self._frequency(sr, target, figures)
        if adversarial:
            total = total + self._adversarial(sr, target, reconstruction, last, figures)
            last.requires_grad_(not frozen)
        return total, figures

    def _decode(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded image, HR and the enlarged LR image, [B, 3, P, P] in [-1, 1]."""
        _, hr, lr, z = batch
        lr_up = to_float(resize_batch(lr, *hr.shape[-2:]))
        return self.network.decode(z, lr_up).float(), to_float(hr), lr_up

    def _reconstruction(self, sr: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        figures = {"l1": F.l1_loss(sr, target)}
        total = self.stage.l1_weight * figures["l1"]
        if self.stage.colour_weight:
            figures["colour"] = colour_loss(sr, target)
            total = total + self.stage.colour_weight * figures["colour"]
        if self.lpips is not None:
            figures["lpips"] = self.lpips(sr, target)
            total = total + self.stage.lpips_weight * figures["lpips"]
        return total, figures

    def _frequency(self, sr: Tensor, target: Tensor, figures: dict[str, Tensor]) -> Tensor:
        if not self.stage.frequency_weight:
            return sr.new_zeros(())
        figures["ffl"] = focal_frequency_loss(sr, target)
        return self.stage.frequency_weight * figures["ffl"]

    def _adversarial(
        self, sr: Tensor, target: Tensor, reconstruction: Tensor, last: Tensor, figures: dict[str, Tensor]
    ) -> Tensor:
        """The decoder's adversarial loss with its adaptive weight, plus the discriminator's own loss."""
        critic = self.critic
        assert critic is not None
        critic.requires_grad_(False)
        against = -critic(sr).float().mean()
        weight = adaptive_weight(reconstruction, against, last)
        critic.requires_grad_(True)
        own = hinge_loss(critic(target).float(), critic(sr.detach()).float())
        figures |= {"adv": against, "adv_weight": weight, "critic": own}
        return self.stage.adversarial_weight * weight * against + own

    def after_step(self, step: int) -> None:
        """Drop what the adaptive weight left at a frozen layer."""
        last = self.network.decoder.conv_out.weight
        if not last.requires_grad:
            last.grad = None

    def evaluate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The loss without its adversarial term, PSNR in dB, and side by side LR enlarged, SR and HR."""
        sr, target, lr_up = self._decode(batch)
        reconstruction, figures = self._reconstruction(sr, target)
        total = reconstruction + self._frequency(sr, target, figures)
        return {"loss": total, "psnr": psnr(sr, target), **figures}, torch.cat((lr_up, sr, target), dim=-1)


def is_trained(name: str, stage: DecoderStage) -> bool:
    """Whether stage 2 trains the parameter `name`: the encoder and the quantiser always stay."""
    if name.startswith(NEW_PARTS):
        return True
    return stage.trainable == "decoder" and name.startswith("decoder.")


def start_from(plain: Autoencoder, network: Autoencoder) -> None:
    """Copy the first stage's weights; the new parts start close to passing features through."""
    network.load_state_dict({**network.state_dict(), **plain.state_dict()})
    fusion = network.decoder.fusion
    if fusion is not None:
        # every path but the shortcuts of its last blocks, which then have only small biases to pass on
        for part in ("encode_enc_1.conv2", "encode_enc_1.conv_out", "encode_enc_3.conv2"):
            nn.init.zeros_(fusion.get_parameter(f"{part}.weight"))
            nn.init.zeros_(fusion.get_parameter(f"{part}.bias"))
    refinement = getattr(network.decoder, "unet_1", None)
    if refinement is not None:
        for block in (refinement.conv1, refinement.up_conv2):
            nn.init.dirac_(block.up_dim.weight)
            nn.init.zeros_(block.up_dim.bias)


def prepare(recipe: Recipe, start: Checkpoint, run: Run, init: Checkpoint | None = None) -> DecoderTask:
    """The task of this stage on top of a checkpoint of stage 1, starting from the weights of `init` if given.

    Raises UsageError where either is another model's.
    """
    config, model = start.config, recipe.model
    if expert_count(config) != expert_count(model) or config.expert_ranges != model.expert_ranges:
        raise UsageError(
            f"{start.directory}: has experts for {config.expert_ranges if config.unet else 'nothing'}, "
            f"the recipe for {model.expert_ranges}; give the checkpoint of moesr-train experts"
        )
    torch.manual_seed(recipe.seed)
    network = Autoencoder(model.decoder)
    if init is None:
        start_from(first_stage_of(recipe, start, run).cpu(), network)
    elif init.config.decoder == model.decoder:
        network.load_state_dict(init.decoder().state_dict())
    else:
        raise UsageError(f"{init.directory}: its decoder is {init.config.decoder}, expected {model.decoder}")
    return DecoderTask(network, recipe.decoder, run.device)


class StandIns(Dataset[tuple[Tensor, ...]]):
    """Samples as `latents.Triples` has them, with noise for latents: enough to measure a step."""

    def __init__(self, data: Crops, channels: int, factor: int) -> None:
        self.data, self.shape = data, (channels, data.patch_px // factor, data.patch_px // factor)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return the number, HR, LR and a latent."""
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

    The latents are the set in `made`, or else are made from `data` in `run.directory/latents`. The weights
    start from the decoder of `init` where there is one, else from the first stage.
    """
    task, stage = prepare(recipe, start, run, init), recipe.decoder
    if made is None:
        if data is None:
            raise UsageError("decoder needs photographs (--data) or latents made from them (--latents)")
        made = run.directory / LATENTS_NAME
        latents.make(recipe, start, data, run, made, stage.latents)
        triples = latents.Triples(made, recipe.seed)
    else:
        triples = latents.open_set(made, recipe, start)
    shown = None
    if held_out is not None:
        place = run.directory / VAL_LATENTS_NAME
        latents.make(recipe, start, held_out, run, place, stage.val_samples)
        shown = latents.Triples(place, None)
    fitted = fit(task, stage, triples, run, "decoder", shown)
    _publish(fitted, recipe, start, run)


def _publish(fitted: Fitted, recipe: Recipe, start: Checkpoint, run: Run) -> None:
    for place, weights in ((CHECKPOINT, fitted.last), (BEST_CHECKPOINT, fitted.best)):
        if weights is not None:
            experts = (cpu_state(start.expert(k)) for k in range(expert_count(recipe.model)))
            publish(run.directory / place, recipe.model, experts, weights)
