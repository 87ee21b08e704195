"""Functions that the benchmark programs share."""
