"""Attention without the matrix of scores, for heads up to 512 wide."""
