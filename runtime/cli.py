"""Super-resolve images with an engine.

Each INPUT is an image file or a directory of images. Results go to OUT: a file (for one input file), or a
directory (that exists, ends in a slash, or takes several results); without -o they go beside their inputs as
NAME_x4.png. A directory run again does what is missing.
Exit codes: 0 all done, 1 some inputs failed, 2 usage, 3 engine unusable, 4 out of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from moesr.runtime import image_io
from moesr.runtime.colour import COLOR_FIXES
from moesr.runtime.errors import MemoryLimitError, MoesrError, UsageError
from moesr.runtime.manifest import SAMPLERS
from moesr.runtime.paths import Task, check_usage, plan
from moesr.runtime.backends import BACKENDS
from moesr.runtime.upscaler import Upscaler

log = logging.getLogger("moesr")

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `moesr-run`; returns the exit code."""
    args = parser().parse_args(argv)
    with logging_to_stderr(logging.WARNING if args.quiet else logging.INFO):
        return guarded(lambda: run(args), debug=args.debug)


def guarded(work: Callable[[], int], *, debug: bool) -> int:
    """Run a program's body; whatever it raises becomes one line on stderr and an exit code."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        log.error("interrupted; finished results are kept")
        return INTERRUPTED
    except MoesrError as error:
        log.error("%s", error)
        return error.exit_code
    except MemoryError:
        log.error("out of memory; close other programs, or use a smaller image")
        return MemoryLimitError.exit_code
    except BrokenPipeError:  # whoever read our output has gone; keep the interpreter from flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        log.error("internal error, please report it: %s: %s%s", type(error).__name__, error, _hint(debug))
        return 1


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit code."""
    check_usage(args.inputs, args.output)
    with Upscaler(
        args.engine, backend=args.backend, device=args.device, threads=args.threads, verify=not args.no_verify
    ) as upscaler:
        tasks = plan(args.inputs, args.output, upscaler.manifest.scale, args.force)
        if not tasks:
            raise UsageError(f"no images in {', '.join(map(str, args.inputs))}")
        options = {"steps": args.steps, "sampler": args.sampler, "seed": args.seed}
        options |= {"color_fix": args.color_fix, "fidelity": args.fidelity}
        with _bar(args.quiet) as bar:
            return Batch(upscaler, tasks, bar).run(options)


class Batch:
    """Tasks on their way through one upscaler; a task that fails is reported and leaves the others alone."""

    def __init__(self, upscaler: Upscaler, tasks: Sequence[Task], bar: tqdm) -> None:
        self._upscaler, self._tasks, self._bar = upscaler, tasks, bar
        self._begun: deque[Task] = deque()  # loaded, result outstanding
        self._codes = [0]

    def run(self, options: dict[str, object]) -> int:
        """Do every task; returns the exit code."""
        results = self._upscaler.map(self._images(), return_errors=True, progress=self._progress, **options)
        for result in results:
            task = self._begun.popleft()
            if isinstance(result, Exception):
                self._fail(task, result)
                continue
            try:
                image_io.save(task.target, result)
            except (MoesrError, MemoryError) as error:
                self._fail(task, error)
            else:
                tqdm.write(f"{task.source} -> {task.target}", file=sys.stdout)
        return max(self._codes)

    def _images(self) -> Iterator[Image.Image]:
        """Load each input when the upscaler has room for it."""
        scale = self._upscaler.manifest.scale
        for number, task in enumerate(self._tasks, 1):
            self._bar.set_description(f"{number}/{len(self._tasks)} {task.source.name}"[-40:])
            if task.finished:
                log.info("%s: skipped, %s exists (--force does it again)", task.source, task.target)
                continue
            try:
                if task.error:
                    raise task.error
                loaded = image_io.load(task.source)
                height, width = loaded.pixels.shape[:2]
                image_io.check_output(task.target, width * scale, height * scale)
            except (MoesrError, MemoryError) as error:
                self._fail(task, error)
                continue
            self._begun.append(task)
            yield image_io.to_pil(loaded)

    def _fail(self, task: Task, error: Exception) -> None:
        """Report a task's error; the exit code becomes the gravest one."""
        text = str(error) or "out of memory; use a smaller image"
        log.error("%s", text if str(task.source) in text else f"{task.source}: {text}")
        code = error.exit_code if isinstance(error, MoesrError) else MemoryLimitError.exit_code
        self._codes.append(
            1 if code == UsageError.exit_code else code
        )  # the command was right, a file was not

    def _progress(self, done: int, total: int, stage: str) -> None:
        self._bar.total = total
        self._bar.set_postfix_str(stage, refresh=False)
        self._bar.update(done - self._bar.n)


def parser() -> argparse.ArgumentParser:
    """The command line of `moesr-run`."""
    p = argparse.ArgumentParser("moesr-run", description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image file or directory of images")
    p.add_argument("-o", "--output", metavar="OUT", help="file or directory (default: beside each input)")
    p.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the engine's)")
    p.add_argument(
        "--sampler", choices=SAMPLERS, help="ddpm adds noise at every step, ddim none (default: the engine's)"
    )
    p.add_argument(
        "--seed", type=int, default=42, help="of the noise; same seed, same result (default: %(default)s)"
    )
    p.add_argument(
        "--color-fix",
        choices=COLOR_FIXES,
        default="adain",
        help="towards the input's colours (default: %(default)s)",
    )
    p.add_argument(
        "--fidelity", type=float, default=1.0, metavar="W", help="0 free to 1 faithful (default: %(default)s)"
    )
    p.add_argument("--force", action="store_true", help="overwrite results that exist")
    add_engine_options(p)
    p.add_argument(
        "--quiet", action="store_true", help="no progress bar and no notes, only warnings and errors"
    )
    return p


def add_engine_options(p: argparse.ArgumentParser) -> None:
    """Options that choose the engine and how it runs, shared with `moesr-doctor`."""
    p.add_argument(
        "--engine", type=Path, metavar="DIR", help="engine directory, or demo-x4 (default) or demo-x8"
    )
    p.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="what runs the engine (default: %(default)s)",
    )
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: the fastest that the backend has)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")
    p.add_argument(
        "--no-verify", action="store_true", help="do not compare the engine's hashes: a faster start"
    )
    p.add_argument("--debug", action="store_true", help="show where an internal error happened")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


@contextlib.contextmanager
def logging_to_stderr(level: int) -> Iterator[None]:
    """Send the log to stderr as "moesr: message" lines, above the bar, for the time of a `with` block."""
    handler, before = _BarHandler(), log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class _BarHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"moesr: {prefix}{record.getMessage()}", file=sys.stderr)


def _bar(quiet: bool) -> tqdm:
    """Bar with the time left on stderr; where that is a file, a line every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=0, unit="tile", disable=quiet, mininterval=interval, dynamic_ncols=True, file=sys.stderr
    )


def _hint(debug: bool) -> str:
    return "" if debug else " (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
