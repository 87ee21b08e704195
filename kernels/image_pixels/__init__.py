"""A result in [-1, 1] as pixels of the caller's array."""
