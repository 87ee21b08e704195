"""Attention that never stores the matrix of scores, for heads up to 512 channels wide."""
