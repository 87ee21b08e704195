"""The loop: images as jobs, jobs as passes, passes as ticks on a device."""
