"""StableSR's stage 1: a structure encoder and SPADE layers on a frozen Stable Diffusion (section 3.1).

Of the UNet only the SPADE layers are trained. The trained network consists of these layers and the encoder,
so averages and saved states do not include the frozen weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesr.runtime.errors import UsageError
from moesr.training.checkpoint import Checkpoint, StableDiffusionCheckpoint, StableSRCheckpoint
from moesr.training.config import StableDiffusionConfig, StableSRConfig
from moesr.training.data.crops import Crops, resize_batch, to_float
from moesr.training.loop.fit import Run, fit
from moesr.training.loop.validation import psnr
from moesr.training.losses.diffusion import add_noise, denoising_loss, predict_x0
from moesr.training.networks import Autoencoder, StableSRUNet, StructureEncoder
from moesr.training.networks.stablesr import SPADE
from moesr.training.recipe import Recipe
from moesr.training.seeded_random import DIFFUSION, SampleRng
from moesr.training.stages.common import (
    BEST_CHECKPOINT,
    CHECKPOINT,
    cpu_state,
    degradation,
    first_stage_of,
    first_stage_sizes,
    publish,
    with_lr,
)


class TrainableParts(nn.Module):
    """The network that stage 1 trains: the structure encoder and the SPADE layers, shared with `unet`."""

    def __init__(self, unet: StableSRUNet, structure: StructureEncoder) -> None:
        super().__init__()
        self.structure = structure
        found = {name: module for name, module in unet.named_modules() if isinstance(module, SPADE)}
        self.spades = nn.ModuleDict({name.replace(".", "_"): module for name, module in found.items()})


@dataclass(frozen=True, eq=False)
class Denoiser:
    """StableSR with a fixed text: predicts eps or v from z_t, the LR latent and the timestep."""

    unet: StableSRUNet
    structure: StructureEncoder
    text: Tensor  # [1, tokens, text_channels]

    def __call__(self, z_t: Tensor, latent: Tensor, t: Tensor) -> Tensor:
        """Latents `z_t` and scaled LR latents [B, C, h, w], `t` [B] -> the prediction [B, C, h, w]."""
        return self.unet(z_t, t, self.structure(latent, t), self.text)


def scaled_latent(first_stage: Autoencoder, image: Tensor, rng: SampleRng, config: StableSRConfig) -> Tensor:
    """Encode images [B, 3, H, W] in [-1, 1] to latents in the UNet's scale, [B, C, H/f, W/f]."""
    sizes = first_stage.config
    noise = rng.normal(sizes.embed_dim, *(side // sizes.factor for side in image.shape[-2:]))
    return config.latent_scale * first_stage.sample(image, noise.to(image.device)).float()


class StructureObjective:
    """Train StableSR to predict eps or v, as the recipe says, at every timestep."""

    critic = None

    def __init__(self, model: Denoiser, first_stage: Autoencoder, recipe: Recipe) -> None:
        self.model, self.first_stage, self.recipe = model, first_stage, recipe
        self.config = stablesr(recipe)
        model.unet.requires_grad_(False)
        self.network = TrainableParts(model.unet, model.structure).requires_grad_(True)

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the prediction for crops (number, HR) or (number, HR, LR)."""
        rng = SampleRng(self.recipe.seed, DIFFUSION, batch[0].tolist())
        z, latent = self.encode(batch, rng)
        return self._loss(z, latent, rng), {}

    def _loss(self, z: Tensor, latent: Tensor, rng: SampleRng) -> Tensor:
        schedule = self.config.schedule
        t_range, prediction = (0, schedule.timesteps), self.config.prediction
        return denoising_loss(self.model, z, latent, t_range, schedule, rng, prediction=prediction)

    @torch.no_grad()
    def encode(self, batch: Sequence[Tensor], rng: SampleRng) -> tuple[Tensor, Tensor]:
        """Encode crops (number, HR[, LR]): scaled latents of HR and of the enlarged LR, [B, C, P/f, P/f]."""
        numbers, hr, *made = batch
        lr = made[0] if made else degradation(self.recipe)(hr, numbers)
        images = to_float(hr), to_float(resize_batch(lr, *hr.shape[-2:]))
        z, latent = (scaled_latent(self.first_stage, image, rng, self.config) for image in images)
        return z, latent

    def after_step(self, step: int) -> None:
        """Do nothing: this stage modifies no weights after a step."""

    def evaluate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss, and the crop beside the image predicted from the middle timestep."""
        rng, config = SampleRng(self.recipe.seed, DIFFUSION, batch[0].tolist()), self.config
        z, latent = self.encode(batch, rng)
        loss = self._loss(z, latent, rng)
        t = torch.full((len(z),), config.schedule.timesteps // 2, device=z.device)
        z_t = add_noise(z, rng.normal(*z.shape[1:]).to(z.device), t, config.schedule)
        x0 = predict_x0(z_t, self.model(z_t, latent, t), t, config.schedule, config.prediction)
        hr, sr = to_float(batch[1]), self.first_stage.decode(x0.float() / config.latent_scale)
        return {"loss": loss, "psnr": psnr(sr, hr)}, torch.cat((sr, hr), dim=-1)


def stablesr(recipe: Recipe) -> StableSRConfig:
    """Return the recipe's model; UsageError if it is not StableSR."""
    if not isinstance(recipe.model, StableSRConfig):
        raise UsageError(
            f"{recipe.model.name}: has no structure encoder to train; use a recipe whose model.family is "
            "stablesr, as stablesr-stage1"
        )
    return recipe.model


def prepare(
    recipe: Recipe, start: Checkpoint, run: Run, init: Checkpoint | None = None
) -> StructureObjective:
    """Build the objective of this stage on top of the Stable Diffusion in `start` (it may be in a StableSR).

    The trained parts start from the weights of `init` if given, else from random weights. Raises UsageError
    if a checkpoint belongs to another model.
    """
    config = stablesr(recipe)
    check_diffusion(start, config)
    torch.manual_seed(recipe.seed)
    unet, structure = StableSRUNet(config.unet), StructureEncoder(config.structure)
    assert isinstance(start, StableDiffusionCheckpoint)
    given = {key: tensor for key, tensor in start.unet().state_dict().items() if ".spade." not in key}
    unet.load_state_dict({**unet.state_dict(), **given})
    if init is not None:
        if not isinstance(init, StableSRCheckpoint) or init.config.structure != config.structure:
            raise UsageError(
                f"{init.directory}: has no structure encoder of this recipe; give another --init"
            )
        structure.load_state_dict(init.structure().state_dict())
        trained = {key: tensor for key, tensor in init.unet().state_dict().items() if ".spade." in key}
        unet.load_state_dict({**unet.state_dict(), **trained})
    model = Denoiser(unet.to(run.device), structure, encoded_prompt(start, config).to(run.device))
    return StructureObjective(model, first_stage_of(recipe, start, run), recipe)


@torch.no_grad()
def encoded_prompt(start: StableDiffusionCheckpoint, config: StableSRConfig) -> Tensor:
    """Encode the prompt of a model for its UNet: [1, tokens, text_channels]."""
    return start.text().encode(config.text.prompt)


def denoiser_of(start: Checkpoint, config: StableSRConfig, device: torch.device) -> Denoiser:
    """Load the networks of a checkpoint of stage 1, frozen; UsageError if they do not fit `config`."""
    check_stage_1(start, config)
    assert isinstance(start, StableSRCheckpoint)
    networks = start.unet().to(device), start.structure().to(device)
    return Denoiser(*networks, encoded_prompt(start, config).to(device))


def check_stage_1(start: Checkpoint, config: StableSRConfig) -> None:
    """Raise UsageError unless a checkpoint holds all networks that sampling with `config` needs."""
    check_diffusion(start, config)
    if not isinstance(start, StableSRCheckpoint) or start.config.structure != config.structure:
        raise UsageError(
            f"{start.directory}: has no structure encoder of this recipe; give the checkpoint of moesr-train "
            "structure"
        )


def check_diffusion(start: Checkpoint, config: StableSRConfig) -> None:
    """Raise UsageError unless a checkpoint holds the Stable Diffusion that `config` is built on."""
    given = start.config
    if not isinstance(given, (StableDiffusionConfig, StableSRConfig)):
        raise UsageError(
            f"{start.directory}: holds no Stable Diffusion; give the directory that moesr-import "
            "--stable-diffusion wrote"
        )
    channels = config.unet.structure_channels
    pairs = {
        "model.unet": (dataclasses.replace(given.unet, structure_channels=channels), config.unet),
        "model.text": (
            dataclasses.replace(
                given.text,
                prompt=config.text.prompt,
                guided_prompt=config.text.guided_prompt,
                negative_prompt=config.text.negative_prompt,
            ),
            config.text,
        ),
        "model.prediction": (given.prediction, config.prediction),
        "model.latent_scale": (given.latent_scale, config.latent_scale),
        "model.schedule": (given.schedule, config.schedule),
    }
    for entry, (got, want) in pairs.items():
        if got != want:
            raise UsageError(f"{start.directory}: has {got}, the recipe's {entry} is {want}; make them equal")


def train(
    recipe: Recipe,
    data: Crops,
    run: Run,
    start: Checkpoint,
    held_out: Crops | None = None,
    *,
    init: Checkpoint | None = None,
) -> None:
    """Train the structure encoder and SPADE; writes `run.directory/checkpoint` with a plain decoder."""
    objective = prepare(recipe, start, run, init)
    samples = with_lr(data, recipe, run.device.type)
    shown = None if held_out is None else with_lr(held_out, recipe, run.device.type)
    fitted = fit(objective, recipe.structure, samples, run, "structure", shown)
    config = dataclasses.replace(stablesr(recipe), decoder=first_stage_sizes(recipe))
    assert isinstance(start, StableDiffusionCheckpoint)
    for place, weights in ((CHECKPOINT, fitted.last), (BEST_CHECKPOINT, fitted.best)):
        if weights is not None:
            objective.network.load_state_dict(weights)
            networks = {"structure": lambda: objective.model.structure, "text": start.text}
            others = ((part, cpu_state(network())) for part, network in networks.items())
            unet, decoder = cpu_state(objective.model.unet), cpu_state(objective.first_stage)
            publish(run.directory / place, config, [unet], decoder, others=others)
