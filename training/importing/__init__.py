"""Import of published checkpoints."""
