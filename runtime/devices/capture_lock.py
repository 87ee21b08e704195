"""A lock that keeps the opening of graphs and the capture of CUDA graphs apart.

A library that opens a graph may allocate memory or synchronize the device, and either can invalidate a
capture that another thread has begun on the same GPU. A thread that opens a graph for a GPU, or lets a
library capture one, holds `capture_lock`. A device that wants to capture tries to acquire it and, if that
fails, runs this tick without a CUDA graph.
"""

from __future__ import annotations

import threading

capture_lock = threading.RLock()
