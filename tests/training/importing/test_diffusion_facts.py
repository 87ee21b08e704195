"""The schedule and the latent scale of a published file are read from its buffers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_l2
from graphs import PLAIN_LDM, random_decoder

from moesr.runtime.sampling.schedule import Schedule
from moesr.training.importing.diffusion_facts import DiffusionFacts, diffusion_facts, scaled_autoencoder
from moesr.training.networks import Autoencoder

FILE = Path("model.ckpt")
CONFIGS = {
    "vq": PLAIN_LDM.decoder,
    "kl": replace(PLAIN_LDM.decoder, codebook_size=0),
}


@pytest.mark.parametrize(
    "schedule",
    [Schedule(), Schedule(1000, 0.0015, 0.0195), Schedule(1000, 0.00085, 0.012), Schedule(500, 1e-4, 0.02)],
    ids=["published", "lsun", "stable-diffusion", "500-steps"],
)
def test_schedule_is_read(schedule):
    betas = torch.from_numpy(schedule.betas.astype(np.float32))
    assert diffusion_facts(FILE, {"betas": betas}) == DiffusionFacts(schedule)


def test_file_without_buffers_has_the_published_facts():
    assert diffusion_facts(FILE, {"out.2.bias": torch.ones(3)}) == DiffusionFacts(Schedule(), 1.0)


@pytest.mark.parametrize(
    "values",
    [np.linspace(0.0015, 0.0155, 1000), np.linspace(0, 1, 1000), np.full(1000, np.nan), np.zeros(1)],
    ids=["linear", "not-betas", "nan", "one"],
)
def test_another_form_of_schedule_gets_a_warning(values, caplog):
    facts = diffusion_facts(FILE, {"betas": torch.from_numpy(values)})
    assert facts.schedule == Schedule() and not caplog.records
    facts.warn(FILE)
    assert "model.ckpt: the square roots of its betas are not evenly spaced" in caplog.text


@pytest.mark.parametrize("kind", CONFIGS)
@torch.inference_mode()
def test_autoencoder_takes_up_the_latent_scale(kind):
    """Latents are multiplied by the factor, samples of the posterior too, and images stay as they are."""
    config, factor, rng = CONFIGS[kind], 0.37, torch.Generator().manual_seed(0)
    plain = random_decoder(replace(PLAIN_LDM, decoder=config))
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    scaled = Autoencoder(config).eval()
    scaled.load_state_dict(scaled_autoencoder(plain.state_dict(), config, factor))
    image, z = torch.randn(1, 3, 16, 16, generator=rng), torch.randn(2, 1, 3, 4, 4, generator=rng)
    pairs = {
        "encode": (scaled.encode(image), factor * plain.encode(image)),
        "decode": (scaled.decode(factor * z[0]), plain.decode(z[0])),
    }
    if kind == "kl":
        pairs["sample"] = scaled.sample(image, z[1]), factor * plain.sample(image, z[1])
    for name, (got, want) in pairs.items():
        assert relative_l2(got.numpy(), want.numpy()) < 1e-5, name
    assert all(torch.equal(before[key], tensor) for key, tensor in plain.state_dict().items())


def test_unscaled_autoencoder_is_unchanged():
    state = random_decoder(PLAIN_LDM).state_dict()
    assert all(scaled_autoencoder(state, PLAIN_LDM.decoder, 1.0)[key] is state[key] for key in state)
