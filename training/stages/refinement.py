"""The refinement network alone, on a frozen KL autoencoder of a text-to-image model (MoE-SR, appendix D).

Photographs are encoded and decoded again. Only the refinement network inside the decoder is trained, with L1,
LPIPS, adversarial and focal frequency losses, so latents, encoder and the rest of the decoder stay as they
were: any text-to-image model of this autoencoder can use the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from moesr.runtime.errors import UsageError
from moesr.training.checkpoint import Checkpoint
from moesr.training.config import VaeConfig
from moesr.training.data.crops import Crops, to_float
from moesr.training.loop.fit import Run, fit
from moesr.training.networks import Autoencoder
from moesr.training.recipe import DecoderStage, Recipe
from moesr.training.stages.common import BEST_CHECKPOINT, CHECKPOINT, first_stage_of, publish
from moesr.training.stages.decoder import DecoderObjective, start_from


class RefinementObjective(DecoderObjective):
    """Reconstruct photographs from their own latents, the means of the posteriors."""

    def __init__(self, network: Autoencoder, stage: DecoderStage, device: torch.device) -> None:
        super().__init__(network, dataclasses.replace(stage, trainable="fusion+refinement"), device)

    def _decode(
        self, batch: Sequence[Tensor], fidelity: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the decoded image twice, the photograph, and the image without refinement if evaluating.

        All are [B, 3, P, P] in [-1, 1]. There is no color correction and no LR image.
        """
        target = to_float(batch[1])
        with torch.no_grad():
            z = self.network.encode(target)
            evaluating = not self.network.training
            plain = self.network.decode(z, refined=False).float() if evaluating else target
        decoded = self.network.decode(z).float()
        return decoded, decoded, target, plain


def prepare(
    recipe: Recipe, start: Checkpoint, run: Run, init: Checkpoint | None = None
) -> RefinementObjective:
    """Build the objective for the autoencoder of `start`, with the refinement network of `init` if given.

    Raises UsageError if one of the checkpoints does not fit the recipe.
    """
    model = recipe.model
    if not isinstance(model, VaeConfig) or model.decoder.refinement == "none":
        raise UsageError(
            f"{model.name}: refinement trains the autoencoder of a text-to-image model with a refinement "
            'network; give a recipe whose model has the family "autoencoder"'
        )
    if isinstance(start.config, VaeConfig) and not start.config.encoder:
        raise UsageError(f"{start.directory}: has no encoder, with which photographs become latents")
    torch.manual_seed(recipe.seed)
    network = Autoencoder(model.decoder)
    start_from(first_stage_of(recipe, start, run).cpu(), network)
    if init is not None:
        if init.config.decoder != model.decoder:
            given = init.config.decoder
            raise UsageError(f"{init.directory}: its decoder is {given}, expected {model.decoder}")
        network.decoder.unet_1.load_state_dict(init.decoder().decoder.unet_1.state_dict())
    return RefinementObjective(network, recipe.decoder, run.device)


def train(
    recipe: Recipe,
    data: Crops,
    run: Run,
    start: Checkpoint,
    held_out: Crops | None = None,
    *,
    init: Checkpoint | None = None,
) -> None:
    """Train the refinement network and write `run.directory/checkpoint`, the whole autoencoder."""
    objective, stage = prepare(recipe, start, run, init), recipe.decoder
    fitted = fit(objective, stage, data, run, "refinement", held_out)
    model = recipe.model
    if isinstance(model, VaeConfig) and isinstance(start.config, VaeConfig):
        model = dataclasses.replace(model, latent_scale=start.config.latent_scale)
    dtype = torch.float16 if stage.stored == "fp16" else torch.float32
    for place, weights in ((CHECKPOINT, fitted.last), (BEST_CHECKPOINT, fitted.best)):
        if weights is not None:
            publish(run.directory / place, model, [], weights, dtype)
