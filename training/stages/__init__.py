"""The training stages, one module each: from a recipe and photographs to a checkpoint directory."""
