"""The TensorRT backend: plans, kernels between plans, and the sessions that run them."""
