"""Triton kernels of single operators, each beside a plain PyTorch reference."""
