"""The inverted residual (expand, depthwise 3x3, reduce, with BatchNorm folded in) in one launch."""
