"""What the pages show runs as it stands there: `bash` and `python` blocks, in order, each page in a folder of its own.

Blocks of `console` are shown only: they need a GPU, a container, or another program's server. The folder holds a tiny
model under the name that the pages use, a little data of every task, and instruction data. Commands that would read the
hub read that data.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import tinybase
from tests.tasks.rows import ROWS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "pages"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FROM_THE_HUB = re.compile(r"^((?:python launch\.py|mlora) gen (?!.*--data_path)(?!.*rows\.json).*)$", re.MULTILINE)


def pages() -> list[Path]:
    return sorted(PAGES.glob("*.md"))


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind in languages]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data that the pages speak of."""
    folder = tmp_path_factory.mktemp("world")
    tinybase.save(folder / "meta-llama" / "Llama-2-7b-hf")
    for task, row in ROWS.items():
        place = folder / "data" / task.replace(":", "-")
        place.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (place / f"{split}.jsonl").write_text(8 * (json.dumps(row) + "\n"))
    rows = [{"instruction": f"say {i}", "input": "", "output": str(i)} for i in range(12)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "prompts.txt").write_text("say 1\nsay 2\n")
    programs = folder / "bin"
    programs.mkdir()
    for name, target in (("python", sys.executable), ("mlora", f"{sys.executable} {ROOT / 'launch.py'}")):
        (programs / name).write_text(f'#!/bin/sh\nexec {target} "$@"\n')
        (programs / name).chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in pages() if blocks(p, "bash", "python")], ids=lambda p: p.stem)
def test_what_a_page_shows_runs(page: Path, world: Path, tmp_path: Path) -> None:
    if page.stem == "quantised" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs the package bitsandbytes")
    for name in ("meta-llama", "data", "rows.json", "prompts.txt"):
        (tmp_path / name).symlink_to(world / name)
    for name in ("launch.py", "generate.py", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{world / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    for kind, text in blocks(page, "bash", "python"):
        local = FROM_THE_HUB.sub(r"\1 --data_path data", text)
        command = ["bash", "-euo", "pipefail", "-c", local] if kind == "bash" else [sys.executable, "-c", local]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{local}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr


def test_every_page_is_in_the_table_of_contents() -> None:
    text = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": (\S+\.md)$", text, flags=re.MULTILINE)
    assert sorted(listed) == [page.name for page in pages()] and yaml.safe_load(text)["docs_dir"] == "pages"


def test_blocks_say_what_they_are() -> None:
    for page in pages():
        kinds = {kind for kind, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
        assert kinds <= {"bash", "python", "console", "json", "text"}, f"{page.name}: {kinds}"


def test_every_command_of_the_pages_exists() -> None:
    from mlora.cli.program import program

    for page in pages():
        for _, text in blocks(page, "bash", "console"):
            for command in re.findall(r"(?:launch\.py|^mlora|-t mlora|mlora) (\w+)", text, flags=re.MULTILINE):
                assert command in program.commands or command in ("help",), f"{page.name}: {command}"


def test_the_reference_is_current() -> None:
    specification = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert specification is not None and specification.loader is not None
    reference = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(reference)
    written = (PAGES / "configuration.md").read_text(encoding="utf-8")
    assert written == reference.page(), "docs/pages/configuration.md is out of date: run `python docs/reference.py`"
    assert "| `lr` | number > 0 | `0.0002` |" in written and "| `name` | text | required |" in written


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_nothing_of_others(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the package mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    methods = (tmp_path / "methods.html").read_text(encoding="utf-8")
    assert methods.count("<math") > 30 and "arithmatex" not in methods
    for page in tmp_path.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?://[^"]+)"', text)
        assert not [address for address in fetched if "canonical" not in address], page.name
