"""The examples on the pages in docs/pipelines run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted((ROOT / "docs" / "pipelines").glob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = "runs/demo_reviews-nin-text-base-seed0"

# Blocks of one page run one after another in one process, as a reader would type them.
DRIVER = """
import json, subprocess, sys
namespace = {"__name__": "example"}
for language, line, code in json.load(open(sys.argv[1])):
    print(f"--- {language}, line {line}", file=sys.stderr, flush=True)
    if language == "sh":
        subprocess.run(["sh", "-ec", code], check=True)
    else:
        exec(compile("\\n" * line + code, sys.argv[2], "exec"), namespace)
"""


def test_there_are_pages() -> None:
    assert PAGES


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_examples_run_as_they_stand(page: Path, trained: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = [(m[1], text[: m.start()].count("\n") + 1, m[2]) for m in BLOCK.finditer(text)]
    assert blocks, f"{page} has no example"
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    shutil.copytree(trained, tmp_path / MODEL)
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    (tmp_path / "driver.py").write_text(DRIVER)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    finished = subprocess.run(
        [sys.executable, "driver.py", "blocks.json", str(page)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
