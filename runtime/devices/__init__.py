"""Devices: memory, and the operations that surround a graph in a tick."""
