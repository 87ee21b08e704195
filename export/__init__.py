"""From a checkpoint directory to an engine directory: graphs, precision, parity proof, packaging."""
