"""The mathematics of sampling: schedule, samplers, noise and tile windows."""
