"""Stage 1: the sampling experts with Space MoE (paper section 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from moesr.runtime.errors import InputError, UsageError
from moesr.training.checkpoint import Checkpoint, expert_count
from moesr.training.config import UNetConfig
from moesr.training.data.crops import Crops, condition, resize_batch, to_float
from moesr.training.loop import distributed
from moesr.training.loop.fit import Fitted, Run, Samples, finished, fit
from moesr.training.loop.trainer import read_state, write_state
from moesr.training.loop.validation import psnr
from moesr.training.losses.diffusion import add_noise, denoising_loss, predict_x0
from moesr.training.networks import Autoencoder, DenoisingUNet, SpaceMoE, share_expert_weights
from moesr.training.recipe import ExpertStage, Recipe
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

POOL_NAME = "latents.pt"
POOL_BATCH = 16  # batch size of the encoding


class ExpertObjective:
    """Train one expert to predict eps, v or x0, as the recipe says, for timesteps of one range."""

    critic = None

    def __init__(
        self, network: DenoisingUNet, first_stage: Autoencoder, recipe: Recipe, t_range: tuple[int, int]
    ) -> None:
        self.network, self.first_stage, self.recipe, self.t_range = network, first_stage, recipe, t_range

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the prediction.

        A batch is (number, HR), (number, HR, LR), or from a pool (number, latent, condition).
        """
        numbers, *pair = batch
        z, cond = pair if pair[0].is_floating_point() else self.encode(batch)
        return self._denoising_loss(z, cond, numbers), {}

    def _denoising_loss(self, z: Tensor, cond: Tensor, numbers: Tensor) -> Tensor:
        rng = SampleRng(self.recipe.seed, DIFFUSION, numbers.tolist())
        schedule, offset = self.recipe.model.schedule, self.recipe.experts.offset_noise
        prediction = self.recipe.model.prediction
        return denoising_loss(self.network, z, cond, self.t_range, schedule, rng, offset, prediction)

    @torch.no_grad()
    def encode(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Encode crops (number, HR) or (number, HR, LR): latents and conditions, both [B, 3, P/f, P/f]."""
        numbers, hr, *made = batch
        lr = made[0] if made else degradation(self.recipe)(hr, numbers)
        cond = condition(lr, self.recipe.model.scale, self.first_stage.config.factor)
        return self.first_stage.encode(to_float(hr)), cond

    def after_step(self, step: int) -> None:
        """Apply expert weight sharing (Eq. 5)."""
        gamma = self.recipe.experts.gamma_at(step + 1)
        if gamma is not None:
            share_expert_weights(self.network, gamma)

    def evaluate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss, and the crop beside the image predicted from the middle timestep of the range."""
        hr, lr = batch[1], batch[2] if len(batch) > 2 else degradation(self.recipe)(batch[1], batch[0])
        (z, cond), schedule = self.encode((batch[0], hr, lr)), self.recipe.model.schedule
        loss = self._denoising_loss(z, cond, batch[0])
        t = torch.full((len(z),), sum(self.t_range) // 2, device=z.device)
        eps = SampleRng(self.recipe.seed, DIFFUSION, batch[0].tolist()).normal(*z.shape[1:]).to(z.device)
        z_t = add_noise(z, eps, t, schedule)
        x0 = predict_x0(z_t, self.network(z_t, cond, t), t, schedule, self.recipe.model.prediction)
        enlarged = to_float(resize_batch(lr, *hr.shape[-2:])) if self.first_stage.config.lr_residual else None
        hr, sr = to_float(hr), self.first_stage.decode(x0, enlarged)
        return {"loss": loss, "psnr": psnr(sr, hr)}, torch.cat((sr, hr), dim=-1)


class Pool(Dataset[tuple[Tensor, ...]]):
    """(latent, condition) pairs that were encoded before; sample `index` is a random one of them."""

    def __init__(self, z: Tensor, cond: Tensor, seed: int) -> None:
        self.z, self.cond, self.seed = z, cond, seed

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return the number of the sample, a latent and its condition, [3, h, w] each."""
        pick = np.random.default_rng((self.seed, index)).integers(len(self.z))
        return torch.tensor(index), self.z[pick], self.cond[pick]


def make_pool(objective: ExpertObjective, data: Crops, run: Run, path: Path) -> Pool:
    """Encode `latent_pool` crops and write them to `path`; if the file exists already, read it."""
    recipe, count = objective.recipe, objective.recipe.experts.latent_pool
    # All processes check for the file before one of them writes it.
    if distributed.any_process(not path.exists(), run.device):
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for at in range(0, count, POOL_BATCH):
            numbers = torch.arange(at, min(count, at + POOL_BATCH))
            parts.append(objective.encode((numbers, data.crops(at, len(numbers)).to(run.device))))
        z, cond = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        write_state(path, {"z": z, "cond": cond})
    pairs = read_state(path, "z", "cond")
    if len(pairs["z"]) != count:
        raise InputError(f"{path}: not the {count} latents of this recipe; remove it or use another -o")
    return Pool(pairs["z"], pairs["cond"], recipe.seed)


def unet_config(recipe: Recipe) -> UNetConfig:
    """Return the sizes of an expert; UsageError if the recipe has only a decoder."""
    if recipe.model.unet is None:
        raise UsageError("the recipe's model.unet is null: it has no experts to train; describe the UNet")
    return recipe.model.unet


def initial_weights(config: UNetConfig, start: Checkpoint, k: int) -> dict[str, Tensor]:
    """Return initial weights of an expert from expert `k` of a checkpoint, or from its only expert.

    Every space expert starts as a copy of the merged FFN. If the checkpoint has no FFNs (a plain LDM), the
    new FFNs are initialized as identities.
    """
    network = DenoisingUNet(config)
    given = cpu_state(start.expert(min(k, expert_count(start.config) - 1)))
    own = network.state_dict()
    for name, module in network.named_modules():
        if isinstance(module, SpaceMoE):
            given = _with_ffns(given, name, module)
    foreign = sorted(key for key, v in given.items() if key not in own or v.shape != own[key].shape)
    if foreign or given.keys() != own.keys():
        first = [*foreign, *sorted(own.keys() - given.keys())][0]
        raise UsageError(
            f"{start.directory}: its experts are of another network than the recipe's ({first}); use a "
            "checkpoint of the same model.unet"
        )
    return given


def _with_ffns(given: dict[str, Tensor], name: str, module: SpaceMoE) -> dict[str, Tensor]:
    """Return `given` with the FFN of block `name` copied to all its space experts."""
    stage, _, place = name.rpartition(".")
    if f"{name}.moe_norm.weight" not in given:
        given = {_moved(key, stage, int(place)): v for key, v in given.items()}
        for ffn in module.moe_blocks:
            nn.init.zeros_(ffn.get_parameter("3.weight"))
            nn.init.zeros_(ffn.get_parameter("3.bias"))
        return given | {f"{name}.{key}": v.detach() for key, v in module.state_dict().items()}
    prefix = f"{name}.moe_blocks."
    ffn = {key.removeprefix(f"{prefix}0."): v for key, v in given.items() if key.startswith(prefix)}
    return given | {f"{prefix}{i}.{key}": v for i in range(len(module.moe_blocks)) for key, v in ffn.items()}


def _moved(key: str, stage: str, place: int) -> str:
    """Return a layer's key in `stage` after another layer was inserted at index `place`."""
    position, _, rest = key.removeprefix(f"{stage}.").partition(".")
    if not key.startswith(f"{stage}.") or int(position) < place:
        return key
    return f"{stage}.{int(position) + 1}.{rest}"


def prepare(
    recipe: Recipe,
    first_stage: Autoencoder,
    t_range: tuple[int, int] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> ExpertObjective:
    """Build the objective of an expert with `weights` or new ones; `t_range` None means all timesteps."""
    config = unet_config(recipe)
    torch.manual_seed(recipe.seed)
    network = DenoisingUNet(config)
    if weights is not None:
        network.load_state_dict(weights)
    return ExpertObjective(network, first_stage, recipe, t_range or (0, recipe.model.schedule.timesteps))


def train(
    recipe: Recipe,
    data: Crops,
    run: Run,
    start: Checkpoint,
    held_out: Crops | None = None,
    *,
    expert: int | None = None,
    init: Checkpoint | None = None,
) -> None:
    """Train all experts, or only number `expert`; once all are finished, write `run.directory/checkpoint`.

    The experts start from the weights of `init` if given; else, if the recipe has `base_steps`, from one
    network that is first trained on all timesteps; else from random weights. The checkpoint holds a plain
    decoder.
    """
    stage, config, ranges = recipe.experts, unet_config(recipe), recipe.model.expert_ranges
    if expert is not None and not 0 <= expert < len(ranges):
        raise UsageError(f"--expert {expert}: the recipe has experts 0 to {len(ranges) - 1}")
    first_stage = first_stage_of(recipe, start, run)
    samples: Samples = with_lr(data, recipe, run.device.type)
    shown = None if held_out is None else with_lr(held_out, recipe, run.device.type)
    if stage.latent_pool:
        samples = make_pool(prepare(recipe, first_stage), data, run, run.directory / POOL_NAME)

    def fit_part(name: str, part: ExpertStage, objective: ExpertObjective) -> Fitted:
        own = dataclasses.replace(run, directory=run.directory / name)
        return fit(objective, part, samples, own, name, shown)

    base = None
    if stage.base_steps and init is None:
        whole = dataclasses.replace(stage, steps=stage.base_steps)
        base = fit_part("base", whole, prepare(recipe, first_stage)).last
    fitted: dict[int, Fitted] = {}
    for k in range(len(ranges)) if expert is None else [expert]:
        weights = initial_weights(config, init, k) if init else base
        fitted[k] = fit_part(f"expert_{k}", stage, prepare(recipe, first_stage, ranges[k], weights))
    _publish_if_complete(recipe, fitted, first_stage, run, validated=held_out is not None)


def _publish_if_complete(
    recipe: Recipe, fitted: dict[int, Fitted], first_stage: Autoencoder, run: Run, *, validated: bool
) -> None:
    """Write the checkpoint if all experts that are not in `fitted` were finished by earlier runs."""
    count, steps = expert_count(recipe.model), recipe.experts.steps
    parts = [
        fitted.get(k) or finished(run.directory / f"expert_{k}", steps, best=validated) for k in range(count)
    ]
    complete = [part for part in parts if part is not None]
    if distributed.any_process(len(complete) < count, run.device):
        return
    whole = dataclasses.replace(recipe.model, decoder=first_stage_sizes(recipe))
    decoder = cpu_state(first_stage)
    publish(run.directory / CHECKPOINT, whole, [part.last for part in complete], decoder)
    best = [part.best for part in complete if part.best is not None]
    if len(best) == count:
        publish(run.directory / BEST_CHECKPOINT, whole, best, decoder)
