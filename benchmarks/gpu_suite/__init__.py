"""The sections of `gpu.py`, and the functions that they share."""
