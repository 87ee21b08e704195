"""ONNX graphs of the networks."""
