"""Partition of a graph at the operators that our kernels run."""
