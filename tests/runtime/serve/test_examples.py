"""The examples of docs/serving.md run against a server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import picture
from PIL import Image

PAGE = Path(__file__).resolve().parents[3] / "docs" / "serving.md"


def example(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return found


def commands(url: str) -> dict[str, tuple[list[str], str]]:
    """Return the command of each example and the file that it writes."""
    modules = 'import { readFile, writeFile } from "node:fs/promises";\n'
    return {
        "bash": (["bash", "-euc", f"URL={url}\n{example('bash')}"], "large.png"),
        "python": ([sys.executable, "-c", f"url = {url!r}\n{example('python')}"], "large.webp"),
        "js": (
            ["node", "--input-type=module", "-e", f"{modules}const url = '{url}';\n{example('js')}"],
            "large.png",
        ),
    }


@pytest.mark.parametrize(("language", "program"), [("bash", "curl"), ("python", None), ("js", "node")])
def test_examples_run(process, tmp_path, language, program):
    if program and shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    (tmp_path / "photo.png").write_bytes(picture(20, 24))
    command, written = commands(process().url)[language]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / written) as result:
        assert result.size == (96, 80)
