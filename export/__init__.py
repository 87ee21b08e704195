"""Exports a checkpoint directory as an engine directory: graphs, precision, parity proof, packaging."""
