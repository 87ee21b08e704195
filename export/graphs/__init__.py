"""Writes the networks as ONNX graphs."""
