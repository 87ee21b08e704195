"""Files, links, options and commands in README, CONTRIBUTING and docs/ exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import make_options_page
import pytest

from moesr.runtime.backends.selection import BACKENDS
from moesr.runtime.cli import run

REPO = Path(__file__).resolve().parents[1]
TOPS = ("runtime", "export", "kernels", "training", "benchmarks", "tests", "docs")
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "kernels/README.md"]
PAGES += sorted(path for folder in ("docs", "tests") for path in (REPO / folder).rglob("*.md"))

WRITTEN = {
    "reconstruction.md",
    "manifest.json",
    "plan.json",
    "kernels.json",
    "parts.json",
    "config.json",
    "entry.json",
}
"""Names of files that the programs write."""

EXAMPLE = re.compile(r"channel_gain|plain\.py")
"""Files that the worked examples of CONTRIBUTING.md add."""

PARSERS = make_options_page.PARSERS

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))


def test_named_tests_exist():
    text = (REPO / "docs/notes/faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)
    lacking = [f"{file}::{name}" for file, name in named if not _has_test(REPO / file, name)]
    assert len(named) > 50 and lacking == []


def _has_test(path: Path, name: str) -> bool:
    return path.is_file() and f"def {name}(" in path.read_text(encoding="utf-8")


@each_page
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@each_page
def test_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"(?<![\w/.-])((?:{'|'.join(TOPS)})/[\w./-]*[\w/])", text)
    assert [path for path in paths if not (REPO / path).exists() and not EXAMPLE.search(path)] == []
    bare = set(re.findall(r"`([\w/]+\.(?:py|md|json|toml|npz))`", text)) - WRITTEN
    known = {path.relative_to(REPO).as_posix() for top in TOPS for path in (REPO / top).rglob("*.*")}
    known |= {path.name for path in REPO.glob("*.*")}
    missing = [name for name in bare if not any(f"/{path}".endswith(f"/{name}") for path in known)]
    assert [name for name in missing if not EXAMPLE.search(name)] == []


def commands() -> Iterator[tuple[str, str]]:
    """Yield (page, command) for each command of this project in shell blocks, with joined lines."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for command in re.split(r"&&|\|", line.split("#")[0]):
                    if command := re.split("[<>]", command)[0].strip():
                        yield str(page.relative_to(REPO)), command


@pytest.mark.parametrize(("page", "command"), [c for c in commands() if c[1].split()[0] in PARSERS])
def test_commands_are_accepted_by_their_parsers(
    page: str, command: str, every_backend: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(BACKENDS, "plain", "")  # the backend of a worked example
    program, *arguments = shlex.split(command)
    PARSERS[program]().parse_args(arguments)


@pytest.mark.parametrize(("page", "command"), [c for c in commands() if c[1].startswith("make ")])
def test_targets_of_make_exist(page: str, command: str):
    targets = [word for word in command.split()[1:] if not word.startswith("-") and "=" not in word]
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    assert [name for name in targets if not re.search(rf"^{name}:", text, re.MULTILINE)] == []


@pytest.mark.parametrize(("page", "command"), [c for c in commands() if "python" in c[1].split()[0]])
def test_programs_of_python_commands_exist(page: str, command: str):
    words = command.split()[1:]
    if words[0] == "-m":
        module = words[1].removeprefix("moesr.").replace(".", "/")
        assert words[1] == "pytest" or (REPO / f"{module}.py").is_file()
    else:
        assert (REPO / words[0]).is_file()


@pytest.fixture
def every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all backends available; other tests have only one."""
    for name in ("onnxruntime", "openvino", "tensorrt"):
        monkeypatch.setitem(BACKENDS, name, "")


def test_options_of_readme_exist_and_have_the_stated_defaults(every_backend: None):
    text = (REPO / "README.md").read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`-.*?) \| (.*?) \|", text, re.MULTILINE)
    table = {flag: default for flags, default in rows for flag in re.findall(r"`(-[\w-]+)`", flags)}
    actions = {flag: action for action in run.parser()._actions for flag in action.option_strings}
    assert len(table) > 10
    for flag, stated in table.items():
        default = actions[flag].default
        if default not in (None, False):
            assert str(default) in stated
        elif actions[flag].nargs == 0:
            assert stated == "off"


def test_page_of_options_matches_the_programs(every_backend: None):
    cure = "run: python tests/tools/make_options_page.py"
    assert make_options_page.PAGE.read_text(encoding="utf-8") == make_options_page.page(), cure
