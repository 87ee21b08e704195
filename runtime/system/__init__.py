"""Files, memory, processor, caches and the console."""
