"""Networks, data, stages and checkpoints: from photographs to a checkpoint directory."""
