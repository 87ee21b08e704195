"""`moesr-run --ray`: the driver, which sends inputs to workers with Ray Data and reports their results.

Ray schedules, retries and scales. Rows hold names and report lines, never pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from moesr.runtime.cli import batch
from moesr.runtime.cli.batch import RunOptions
from moesr.runtime.cli.engine_options import engine_options
from moesr.runtime.cli.progress import Display
from moesr.runtime.cli.report import Report
from moesr.runtime.cluster import dataset, large
from moesr.runtime.cluster.dataset import Resources
from moesr.runtime.cluster.engines import engine_on_this_node, name_for_nodes
from moesr.runtime.cluster.listing import Sources
from moesr.runtime.cluster.places import check_place, place_of
from moesr.runtime.cluster.worker import Work
from moesr.runtime.engine.hub_names import origin_of
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import UsageError
from moesr.runtime.system import console

log = logging.getLogger("moesr")


def run(args: argparse.Namespace, options: Mapping[str, Any], how: RunOptions) -> int:
    """Do what the arguments of `moesr-run` say on a cluster and return the exit code."""
    check_usage(args)
    report = Report(how.log, how.json_progress)
    name = name_for_nodes(args.engine)
    directory = engine_on_this_node(name)
    manifest = read_manifest(directory, verify=False)  # every worker verifies its own copy
    wanted, how = batch.prepared(manifest, options, how, origin_of(directory))
    check_place(place_of(args.output))
    resources = Resources.of(args, manifest, directory)
    threads = args.threads or max(int(resources.cpus), 1)
    upscaler = {**engine_options(args), "threads": threads}
    theirs = dataclasses.replace(
        how, pre_clean=None, log=None, quiet=True, json_progress=False, to_stdout=True
    )
    work = Work(name, upscaler, args.output, dict(options), theirs, wanted, args.pre_clean)
    inside = place_of(args.output).name("").rstrip("/") + "/"
    sources = Sources(tuple(dict.fromkeys(args.inputs)), how.naming(wanted.scale), how.recursive, inside)
    alone, others = large.split(sources, manifest, resources)
    with dataset.connected(args.ray), _quiet_ray():
        shown = dataclasses.replace(work, how=dataclasses.replace(theirs, quiet=how.quiet))
        first = large.report_rows(alone, shown, resources)
        rows = partial(dataset.report_rows, others, work, resources) if others.names else None
        return Driver(how, report).run(first, rows)


def check_usage(args: argparse.Namespace) -> None:
    """Raise UsageError for options that have no meaning on a cluster."""
    if args.output is None:
        raise UsageError("--ray needs a place for the results; name a folder or URL with -o")
    for name in ("compare", "preserve_times"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} is not available with --ray; leave it out")
    if "-" in (*args.inputs, args.output):
        raise UsageError("standard input and output are not available with --ray; name folders or URLs")
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers is {args.workers}, expected 1 or more")
    for name in ("cpus_per_worker", "gpus_per_worker", "memory_per_worker"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} is {value}, expected a number from 0")
    out = place_of(args.output).name("")
    if any(place_of(source).name("") == out for source in args.inputs):
        raise UsageError(f"{args.output}: is also an input; name another place with -o")


class Driver:
    """Reports the rows of a run as a local run reports its files."""

    def __init__(self, how: RunOptions, report: Report) -> None:
        self._how, self._report = how, report
        self._counts: Counter[str] = Counter(done=0, skipped=0, failed=0)
        self._code = 0

    def run(self, first: Iterable[Mapping[str, Any]], others: Callable[[], dataset.ReportRows] | None) -> int:
        """Report all rows and return the highest exit code; UsageError if there are no inputs.

        `others` starts a dataset after the rows of `first`. An error of the cluster follows the summary.
        """
        try:
            for row in first:
                self.take(row)
            if others and not (self._how.fail_fast and self._counts["failed"]):
                self._follow(others())
        except Exception:
            batch.summary(self._counts)
            raise
        if not sum(self._counts.values()):
            raise UsageError("no images in the inputs")
        batch.summary(self._counts)
        return self._code

    def _follow(self, rows: dataset.ReportRows) -> None:
        """Report the rows of a dataset, with a display of the progress."""
        before = sum(self._counts.values())
        display = Display(0, quiet=self._how.quiet, as_events=self._how.json_progress)
        finished = False
        try:
            for row in rows:
                self.take(row)
                counts, total = rows.counts(), sum(self._counts.values()) - before
                display.count = max(counts.listed, total)
                name = PurePosixPath(json.loads(row["line"])["input"]).name
                stage = "" if counts.complete else "listing continues"
                display.show(total, name, stage, total / display.count)
                if self._how.fail_fast and self._counts["failed"]:
                    log.error("stopped after the first failure (--fail-fast)")
                    break
            else:
                finished = True
        finally:
            rows.close()
            display.close(finished)
            left = rows.counts().listed - sum(self._counts.values()) + before
            if left > 0:
                self._counts["not begun"] = left

    def take(self, row: Mapping[str, Any]) -> None:
        """Report one row."""
        values = json.loads(row["line"])
        self._counts[values["status"]] += 1
        self._code = max(self._code, row["code"])
        for warning in values["warnings"]:
            log.warning("%s", warning if values["input"] in warning else f"{values['input']}: {warning}")
        if values["status"] == "done":
            console.say(f"{values['input']} -> {values['result']}")
        elif values["status"] == "skipped":
            log.info("%s", row["note"])
        else:
            log.error("%s", values["error"])
        self._report.write(values)


class _WithoutRay:
    """A stream that drops the output of Ray's own threads; lost workers are in the report."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet_ray() -> Iterator[None]:
    """Keep Ray's messages off the terminal during a `with` block; its log files hold them."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    before = [logger.level for logger in loggers], sys.stdout, sys.stderr
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    sys.stdout, sys.stderr = _WithoutRay(sys.stdout), _WithoutRay(sys.stderr)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before[0], strict=True):
            logger.setLevel(level)
        sys.stdout, sys.stderr = before[1:]
