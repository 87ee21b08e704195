"""Adapters with the interfaces of diffusers, which is imported only where it is needed."""

from moesr.runtime.integrations.diffusers_decoder import Decoder
from moesr.runtime.integrations.diffusers_upscaler import DiffusersUpscaler, UpscalerOutput

__all__ = ["Decoder", "DiffusersUpscaler", "UpscalerOutput"]
