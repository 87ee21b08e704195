"""The last step of programs that write a page of results to an output directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from moesr.runtime.errors import MoesrError


def print_page(benchmark: Callable[[argparse.Namespace], str], args: argparse.Namespace) -> int:
    """Run `benchmark`, which writes its files to `args.out`, and print the page that it returns.

    Returns 0, or after printing a MoesrError to stderr, the exit code of this error.
    """
    try:
        print(benchmark(args))
    except MoesrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"written to {args.out}", file=sys.stderr)
    return 0
