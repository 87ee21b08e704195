"""Costs of a run on a cluster, and a simulation with them."""
