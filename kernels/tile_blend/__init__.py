"""Adds the weighted output tiles of a graph to the canvases' sums."""
