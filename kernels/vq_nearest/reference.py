"""Finds the nearest code by the matrix of distances, some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # rows of the matrix at a time, which bounds the memory


def vq_nearest(z: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the table rows [B, E, h, w] and the indices [B, h*w] of the codes nearest to each latent.

    `z` is [B, D, h, w], `codes` [codes, D], and `table` [codes, E] holds the codes or a layer's output for
    each of them. Of equally near codes the first one is chosen. Distances leave out |z|^2, which does not
    depend on the code, and are summed in a fixed order, so that a kernel can match them to the last bit:
    ((|e|^2 + z_0 e_0') + z_1 e_1') + ... with e' = -2 e.
    """
    b, d, h, w = z.shape
    flat = z.permute(0, 2, 3, 1).reshape(-1, d).to(codes.dtype)
    norm, doubled = squared_norm(codes), -2.0 * codes
    found = []
    for rows in flat.split(ROWS):
        distance = norm.expand(len(rows), -1)
        for i in range(d):
            distance = distance + rows[:, i, None] * doubled[:, i]
        found.append(distance.argmin(dim=1))
    index = torch.cat(found)
    return table[index].reshape(b, h, w, -1).permute(0, 3, 1, 2).contiguous(), index.reshape(b, -1).int()


def squared_norm(codes: Tensor) -> Tensor:
    """Return |e|^2 of each code, summed in order of the components: [codes]."""
    norm = torch.zeros_like(codes[:, 0])
    for column in codes.unbind(1):
        norm = norm + column * column
    return norm
