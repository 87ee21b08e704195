"""One ONNX file for other runtimes: the whole way from an LR image to its result, with the steps unrolled."""
