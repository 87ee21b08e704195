"""Color correction of a result towards its input, over the whole image."""
