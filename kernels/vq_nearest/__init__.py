"""Finds the nearest code of a codebook without storing the matrix of distances."""
