"""The adversarial losses of VQGAN (Esser et al. 2021, section 3.1): hinge, with an adaptive weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moesr.training.loop import distributed

LARGEST_WEIGHT = 1e4


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator from its scores of real and generated images."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return the weight that makes the adversarial gradient at `last_layer` as large as the other (Eq. 7).

    It is the ratio of the two gradients' norms over all processes, limited to 10,000 and detached.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(distributed.mean(gradient.float()).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, LARGEST_WEIGHT).detach()
