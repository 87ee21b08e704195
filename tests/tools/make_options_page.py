"""Write `docs/options.md`, a page with every option of the programs, from their help texts.

python tests/tools/make_options_page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from moesr.export import cli as export
from moesr.runtime.backends.selection import BACKENDS
from moesr.runtime.cli import decode, doctor, run
from moesr.runtime.serve import cli as serve
from moesr.training import cli as train
from moesr.training.importing import cli as importing

PAGE = Path(__file__).resolve().parents[2] / "docs/options.md"
HEAD = """# Options

Every option of every program, as `--help` describes it. A test compares this page, which
`python tests/tools/make_options_page.py` writes, with the programs.
"""
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "moesr-run": run.parser,
    "moesr-decode": decode.parser,
    "moesr-doctor": doctor.parser,
    "moesr-serve": serve.parser,
    "moesr-export": export.parser,
    "moesr-import": importing.parser,
    "moesr-train": train.parser,
}


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(line for name, make in PARSERS.items() for line in section(name, make()))])


def section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Return the lines of one program."""
    yield f"## {name}\n"
    for group in parser._action_groups:
        rows = [action for action in group._group_actions if action.dest != "help"]
        if not rows:
            continue
        title = {"positional arguments": "arguments", "options": "options"}.get(
            group.title or "", group.title
        )
        yield f"| {title} | |\n| --- | --- |"
        formatter = parser._get_formatter()
        for action in rows:
            yield f"| {flags(action)} | {text(formatter._expand_help(action) if action.help else '')} |"
        yield ""


def flags(action: argparse.Action) -> str:
    """Return the names of an option and of its value."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    return f"{names} {value(action)}".strip()


def value(action: argparse.Action) -> str:
    """Return the name of an option's value, or its choices if there are few."""
    if action.nargs == 0:
        return ""
    if action.dest == "backend":
        return ", ".join(("auto", *sorted(BACKENDS)))
    if action.choices is not None and not action.metavar and len(list(action.choices)) < 10:
        return ", ".join(map(str, action.choices))
    return str(action.metavar or (action.dest.upper() if action.option_strings else action.dest))


def text(help_text: str) -> str:
    """Return a help text as the cell of a table."""
    return " ".join(help_text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit()
