"""Give each process of `pytest -n N` cores of its own when this module is imported."""

import os

worker, count = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if worker and count and hasattr(os, "sched_setaffinity"):
    own = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: int(count)]
    if own:
        os.sched_setaffinity(0, own)
