"""The optimisation ladder of `latency.py`."""
