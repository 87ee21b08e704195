"""Expand, depthwise 3x3 and reduce, BatchNorm folded, in one launch."""
