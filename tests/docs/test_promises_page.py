"""The page of promises names tests that exist, and every promise."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("promises", ROOT / "docs" / "promises.py")
assert _spec is not None and _spec.loader is not None
promises = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(promises)
PAGE = (ROOT / "docs" / "pages" / "promises.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+::[\w:]+)`", PAGE)))


def names_in(file: Path) -> set[str]:
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {prefix + part.name for part in inside if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_exists(name: str) -> None:
    file, _, test = name.partition("::")
    assert test in names_in(ROOT / file)


def test_every_promise_is_there() -> None:
    assert len(NAMED) > 30
    for number in range(1, 26):
        assert re.search(rf"\bR{number}\b", PAGE), number


def test_figures_are_of_runs(tmp_path: Path) -> None:
    """Of numbers the largest, of counts those of one seed, and what did not run or pass is not passed over."""
    case = '<testcase classname="tests.model.test_multi.TestFiles" name="test_x[{}]">{}</testcase>'
    measured = '<properties><property name="off by" value="{}"/><property name="files" value="{}"/></properties>'
    runs = []
    for seed, (off, last) in enumerate((("1e-07", ""), ("3e-06", "<failure/>"))):
        inside = [measured.format(off, 4), measured.format("2e-09", 3), "<skipped/>", last]
        report = tmp_path / f"{seed}.xml"
        report.write_text(f"<testsuite>{''.join(case.format(i, text) for i, text in enumerate(inside))}</testsuite>")
        runs.append(promises.cases(report))
    page = "Made by x\n| R9 | it holds | `tests/model/test_multi.py::TestFiles::test_x` | passes | 1e-5 |\n"
    found = promises.written(page, runs, "Made by y")
    told = "off by 3e-06, files 7, 5 passed, 1 failed, on a GPU alone: not run here"
    assert found == page.replace("Made by x", "Made by y").replace("passes", told)
    assert promises.ROW.findall(PAGE) and promises.MADE.search(PAGE)
