"""Space MoE: feed-forward experts over random token groups, merged for inference (paper section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpaceMoE(nn.Module):
    """`x + FFN(LayerNorm(x))` over the H*W tokens, with `experts` FFNs.

    Training splits the tokens at random into one group per expert (Eq. 4). Evaluation uses one FFN whose
    weights are the mean over the experts; a merged network (`experts=1`) stores only this mean.
    """

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.moe_norm = nn.LayerNorm(channels)
        self.moe_blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(channels, 4 * channels), nn.GELU(), nn.Identity(), nn.Linear(4 * channels, channels)
            )
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        tokens = x.flatten(2).transpose(1, 2)  # [B, L, C]
        h = self.moe_norm(tokens)
        if self.training and len(self.moe_blocks) > 1:
            h = self._split(h)
        else:
            w_in, b_in, w_out, b_out = self.mean_weights()
            h = F.linear(F.gelu(F.linear(h, w_in, b_in)), w_out, b_out)
        return (tokens + h).transpose(1, 2).reshape(x.shape)

    def _split(self, tokens: Tensor) -> Tensor:
        """Send a random group of tokens through each expert (Eq. 4); groups differ by at most one token."""
        order = torch.randperm(tokens.shape[1], device=tokens.device)
        groups = tokens[:, order].tensor_split(len(self.moe_blocks), dim=1)
        mixed = torch.cat([block(g) for block, g in zip(self.moe_blocks, groups, strict=True)], dim=1)
        return mixed[:, torch.argsort(order)]

    def mean_weights(self) -> tuple[Tensor, ...]:
        """Return (w_in, b_in, w_out, b_out) of the merged FFN: the exact mean over the experts."""
        per_expert = [tuple(block.parameters()) for block in self.moe_blocks]
        if len(per_expert) == 1:
            return per_expert[0]
        return tuple(torch.stack(same).mean(dim=0) for same in zip(*per_expert, strict=True))


@torch.no_grad()
def share_expert_weights(network: nn.Module, gamma: float) -> None:
    """Move every space expert towards the mean of the others, in place (Eq. 5).

    `W_i <- gamma W_i + (1 - gamma) mean_{j != i} W_j`, with all right-hand sides evaluated before the update
    and `gamma` in [0, 1]. The optimizer keeps its state, since parameters change in place. The mean over all
    experts does not change.
    """
    for module in network.modules():
        if not isinstance(module, SpaceMoE) or len(module.moe_blocks) < 2:
            continue
        n = len(module.moe_blocks)
        for same in zip(*(block.parameters() for block in module.moe_blocks), strict=True):
            total = torch.stack([p.detach() for p in same]).sum(dim=0)
            for p in same:
                # gamma p + (1-gamma) (total-p)/(n-1)
                p.mul_(gamma - (1 - gamma) / (n - 1)).add_(total, alpha=(1 - gamma) / (n - 1))
