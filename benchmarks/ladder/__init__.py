"""The optimization ladder of `latency.py`: its configurations, processes and report."""
