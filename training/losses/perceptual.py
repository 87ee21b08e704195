"""LPIPS (Zhang et al. 2018) from the `lpips` package, with VGG16 weights from a local file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moesr.runtime.errors import UsageError
from moesr.training.weights import brief

WITHOUT = "or train without LPIPS: --set decoder.lpips_weight=0"

Distance = Callable[[Tensor, Tensor], Tensor]


def load_lpips(weights: str, device: torch.device) -> Distance:
    """Load the LPIPS distance: two images [B, 3, H, W] in [-1, 1] -> a scalar mean. Nothing is downloaded.

    `weights` is torchvision's state dict of VGG16 (`vgg16-397923af.pth`); the linear layers come with the
    package. Raises UsageError if the package or the file is missing, or if the file holds another network.
    """
    try:
        lpips = importlib.import_module("lpips")
    except ImportError as error:
        raise UsageError(
            f"decoder.lpips_weight needs LPIPS, which is not installed ({error}); "
            f"pip install 'moesr[lpips]', {WITHOUT}"
        ) from error
    path = Path(weights)
    if not weights or not path.is_file():
        raise UsageError(
            f"decoder.lpips_weights: {weights!r} is not a file; expected torchvision's VGG16 weights "
            f"(vgg16-397923af.pth), {WITHOUT}"
        )
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # random VGG16: nothing is downloaded
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
        # lpips uses torchvision's numbers for the layers of VGG16, grouped in five slices.
        features = {k.removeprefix("features."): v for k, v in given.items() if k.startswith("features.")}
        own = network.net.state_dict()
        network.net.load_state_dict({key: features[key.partition(".")[2]] for key in own})
    except Exception as error:  # unpickling a damaged file can raise anything
        raise UsageError(f"{path}: not torchvision's VGG16 weights ({brief(error)}); {WITHOUT}") from error
    network = network.requires_grad_(False).eval().to(device)

    def distance(image: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            return network(image.float(), target.float()).mean()

    return distance
