"""The patch discriminator of VQGAN (Esser et al. 2021, after Isola et al. 2017): one score per patch."""

from __future__ import annotations

from torch import Tensor, nn

SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions with BatchNorm; with 3 `layers` the receptive field is 70 px.

    Weights are initialized normally with deviation 0.02, the scales of BatchNorm with mean 1.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        stack: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        width = channels
        for i in range(1, layers + 1):
            wider, stride = channels * min(2**i, 8), 2 if i < layers else 1
            stack += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(SLOPE),
            ]
            width = wider
        self.main = nn.Sequential(*stack, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> scores [B, 1, H/8 - 2, W/8 - 2]; higher looks more real."""
        return self.main(image)
