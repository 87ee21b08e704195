"""The networks of the models, with the parameter names of the published checkpoints."""

from moesr.training.networks.autoencoder import Autoencoder, DecoderOnly
from moesr.training.networks.space_moe import SpaceMoE, share_expert_weights
from moesr.training.networks.stablesr import StableSRUNet, StructureEncoder
from moesr.training.networks.text import TextEncoder
from moesr.training.networks.unet import DenoisingUNet

__all__ = [
    "Autoencoder",
    "DecoderOnly",
    "DenoisingUNet",
    "SpaceMoE",
    "StableSRUNet",
    "StructureEncoder",
    "TextEncoder",
    "share_expert_weights",
]
