"""Slots of a graph's output onto the canvases' sums, weighted."""
