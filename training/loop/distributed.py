"""Data-parallel training: communication between the processes that `torchrun` starts.

N processes with batch size b compute the same step as one process with batch size N b: the samples of a step
are divided by rank, gradients are averaged, and batch norms use the statistics of all processes. Without
`torchrun` there is one process, and no function here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from moesr.runtime.errors import UsageError


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started (NCCL on CUDA, else gloo) and yield this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield torch.device(device)
        return
    own = torch.device(device)
    if own.type == "cuda":
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number >= torch.cuda.device_count():
            raise UsageError(
                f"process {number} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
                "start torchrun with --nproc-per-node of at most that"
            )
        own = torch.device("cuda", number)
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0. Process 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Return once every process has called this function."""
    if size() > 1:
        dist.barrier()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if size() == 1 or not gradients:
        return
    flat = mean(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def mean(values: Tensor) -> Tensor:
    """Return the mean of `values` over the processes."""
    return total(values) / size()


def total(values: Tensor) -> Tensor:
    """Return the sum of `values` over the processes."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean_figures(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Average named scalars over the processes, with one all-reduce."""
    if not figures:
        return {}
    values = mean(torch.stack([f.detach().float() for f in figures.values()]))
    return dict(zip(figures, values.tolist(), strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """Return True in all processes if `flag` is set in at least one."""
    return flag if size() == 1 else bool(total(torch.tensor(float(flag), device=device)) > 0)


def gather(values: Tensor) -> Tensor:
    """Concatenate `values` [B, ...] of all processes, by rank: [size B, ...]."""
    if size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the statistics of all processes' batches; torch's SyncBatchNorm does not run on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = size() * x.numel() // x.shape[1]  # values per channel in all processes
        mean = differentiable_all_reduce(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = differentiable_all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
        self._keep(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics as torch does, with the unbiased variance."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        momentum = 0.1 if self.momentum is None else self.momentum
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)


def synchronise_batch_norms(network: nn.Module) -> None:
    """Give every BatchNorm2d in `network` the statistics of all processes, in place."""
    if size() == 1:
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum, device="meta")
                synced.load_state_dict(child.state_dict(), assign=True)
                synced.requires_grad_(child.weight.requires_grad).train(child.training)
                setattr(module, name, synced)
