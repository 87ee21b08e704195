"""Copies tiles of canvases into the slots of a graph's input."""
