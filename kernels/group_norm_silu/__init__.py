"""GroupNorm followed by SiLU, over NCHW or NHWC memory."""
