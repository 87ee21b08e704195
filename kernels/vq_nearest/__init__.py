"""The nearest code of a codebook, without the matrix of distances."""
