"""The listing of a run as a datasource of Ray Data: one task, whose blocks are read as workers need them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from moesr.runtime.cluster.listing import Sources

REPORT_EVERY = 100
"""The listing is counted for the ledger each time this many rows have been listed."""


class ListingSource(Datasource):
    """The rows of inputs as a datasource; see `listing.rows`."""

    def __init__(self, sources: Sources, ledger: Any) -> None:
        self._sources, self._ledger = sources, ledger

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None, as the size is unknown before the listing is read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return the only task, which lists; it runs as far ahead of the workers as Ray Data allows."""
        sources, ledger = self._sources, self._ledger

        def read() -> Iterator[pyarrow.Table]:
            count = 0
            for count, row in enumerate(sources.rows(), 1):
                if count % REPORT_EVERY == 1:
                    ledger.listed.remote(count)
                yield pyarrow.table({name: [value] for name, value in row.values().items()})
            ledger.listed.remote(count, True)

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown)]
