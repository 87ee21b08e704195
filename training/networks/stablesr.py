"""StableSR's denoising network and its time-aware structure encoder (Wang et al., IJCV 2024, section 3.1).

The UNet is that of Stable Diffusion 2.1. Structure features of the LR latent, computed at every timestep,
modulate the residual of each of its residual blocks (SPADE, Park et al., CVPR 2019).
"""

from __future__ import annotations

from torch import Tensor, nn

from moesr.training.config import StableSRUNetConfig, StructureConfig
from moesr.training.networks import operators
from moesr.training.networks.transformer import TextTransformer
from moesr.training.networks.unet import AttentionBlock, Conditions, Downsample, HalfUNet, ResBlock, UNet

SPADE_CHANNELS = 128


class SPADE(nn.Module):
    """`GroupNorm(h) * (1 + gamma) + beta`, both maps computed from structure features."""

    def __init__(self, channels: int, structure_channels: int, groups: int) -> None:
        super().__init__()
        self.param_free_norm = nn.GroupNorm(groups, channels)  # the published name; it does have parameters
        self.mlp_shared = nn.Sequential(
            nn.Conv2d(structure_channels, SPADE_CHANNELS, 3, padding=1), nn.ReLU()
        )
        self.mlp_gamma = nn.Conv2d(SPADE_CHANNELS, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(SPADE_CHANNELS, channels, 3, padding=1)

    def forward(self, h: Tensor, structure: Tensor) -> Tensor:
        """Modulate `h` [B, C, H, W] by `structure` [B, structure_channels, H, W]."""
        maps = self.mlp_shared(structure)
        h = operators.group_norm(h, self.param_free_norm)
        return h * (1 + self.mlp_gamma(maps)) + self.mlp_beta(maps)


class SPADEResBlock(ResBlock):
    """A residual block whose residual is modulated by the structure features of the same width."""

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, groups: int, structure_channels: int
    ) -> None:
        super().__init__(in_channels, out_channels, emb_channels, groups)
        self.spade = SPADE(out_channels, structure_channels, groups)

    def residual(self, x: Tensor, given: Conditions) -> Tensor:
        """Return the modulated residual, [B, out, H, W]."""
        h = super().residual(x, given)
        return self.spade(h, given.structure[h.shape[-1]])


class StructureEncoder(HalfUNet[StructureConfig]):
    """The down half of a UNet: from the LR latent and a timestep to features of every resolution."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__(config)
        blocks = zip(self.input_blocks, self.skip_channels, strict=True)
        widths = [c for block, c in blocks if isinstance(block[0], Downsample)]  # type: ignore[index]
        widths.append(self.skip_channels[-1])
        self.fea_tran = nn.ModuleList(
            ResBlock(channels, config.out_channels, 4 * config.width, config.norm_groups)
            for channels in widths
        )

    def attention(self, channels: int) -> list[nn.Module]:
        """Attention with the same number of heads at every level."""
        return [AttentionBlock(channels, channels // self.config.heads, self.config.norm_groups)]

    def forward(self, latent: Tensor, t: Tensor) -> dict[int, Tensor]:
        """LR latent [B, C, h, w] and `t` [B] -> features [B, out_channels, h', w'] by their width w'."""
        given = Conditions(self.embed(t))
        h, levels = latent, []
        for block in self.input_blocks:
            if isinstance(block[0], Downsample):  # type: ignore[index]
                levels.append(h)
            h = block(h, given)
        levels.append(self.middle_block(h, given))
        features = [tran(level, given) for tran, level in zip(self.fea_tran, levels, strict=True)]
        return {f.shape[-1]: f for f in features}


class StableSRUNet(UNet[StableSRUNetConfig]):
    """Predict eps or v from z_t, the timestep, the structure of the LR image and a text."""

    def res_block(self, in_channels: int, out_channels: int) -> ResBlock:
        """Return a residual block with SPADE, or a plain one without structure features."""
        config = self.config
        if not config.structure_channels:
            return super().res_block(in_channels, out_channels)
        sizes = 4 * config.width, config.norm_groups, config.structure_channels
        return SPADEResBlock(in_channels, out_channels, *sizes)

    def attention(self, channels: int) -> list[nn.Module]:
        """Return a transformer with self-attention and attention to the text."""
        config = self.config
        return [TextTransformer(channels, config.text_channels, config.head_channels, config.norm_groups)]

    def forward(self, z_t: Tensor, t: Tensor, structure: dict[int, Tensor], text: Tensor) -> Tensor:
        """Return the prediction [B, 4, h, w] for latents `z_t` of that shape and `t` [B].

        `structure` is the output of the structure encoder for the LR latent at the same `t` (empty for a
        network without SPADE). `text` [B or 1, tokens, text_channels] is the encoded prompt. h and w must be
        multiples of `config.factor`.
        """
        return self.run(z_t, Conditions(self.embed(t), structure, text))
