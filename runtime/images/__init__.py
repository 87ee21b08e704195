"""Images: reading, writing, resizing and color correction."""
