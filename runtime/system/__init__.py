"""Files, memory, CPU, caches and the console."""
