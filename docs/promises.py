"""Writes the figures of `docs/pages/promises.md`: what its tests measure, under several seeds.

    python docs/promises.py 0 1 --kills 50 [-- arguments of pytest]

Runs the tests that the page names once for each seed and puts into each row what they have recorded
(`record_property`): of real numbers the largest, of counts the sum of one seed's. Ends with status 1 where one fails.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pages" / "promises.md"
NAME = re.compile(r"`(tests/[\w/.]+::[\w:]+)`")
ROW = re.compile(r"^\| (R\d+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)
MADE = re.compile(r"^Made by .*$", re.MULTILINE)


class Case:
    """One test under one seed.

    Attributes:
        test: as the page names it, without parameters.
        outcome: "passed", "failed" or "skipped".
        recorded: what it measured, by name.
    """

    def __init__(self, element: ElementTree.Element) -> None:
        module, _, inside = re.sub(r"\.(Test\w*)$", r"::\1", element.attrib["classname"]).partition("::")
        parts = (module.replace(".", "/") + ".py", inside, element.attrib["name"].partition("[")[0])
        self.test = "::".join(filter(None, parts))
        kinds = {child.tag for child in element}
        self.outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        self.recorded = {p.attrib["name"]: p.attrib["value"] for p in element.iter("property")}


def figure(runs: list[list[Case]], tests: list[str]) -> str:
    """Return what a row's tests have measured in the runs of all seeds, in words."""
    cases = [[case for case in run if case.test in tests] for run in runs]
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for run in cases for case in run for name in case.recorded):
        values = [[case.recorded[name] for case in run if name in case.recorded] for run in cases]
        if all(value.isdigit() for run in values for value in run):
            found[name] = f"{max(sum(map(int, run)) for run in values):,}"
        else:
            found[name] = f"{max(float(value) for run in values for value in run):.2g}"
    outcomes = Counter(case.outcome for run in cases for case in run)
    said = [f"{name} {value}" for name, value in found.items()]
    said += [f"{outcomes[kind]} {kind}" for kind in ("passed", "failed") if outcomes[kind]]
    return ", ".join([*said, *(["on a GPU alone: not run here"] if outcomes["skipped"] else [])])


def written(page: str, runs: list[list[Case]], made: str) -> str:
    """Return the page with these runs' figures."""
    row = lambda r: f"| {r[1]} | {r[2]} | {r[3]} | {figure(runs, NAME.findall(r[3]))} | {r[5]} |"  # noqa: E731
    return MADE.sub(made, ROW.sub(row, page))


def cases(report: Path) -> list[Case]:
    """Return what pytest has reported as JUnit XML."""
    return [Case(element) for element in ElementTree.parse(report).iter("testcase")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--reports", type=Path, help="folder of reports of earlier runs, which are not run again")
    given, rest = parser.parse_known_args()
    page = PAGE.read_text(encoding="utf-8")
    tests = sorted(set(NAME.findall(page)))
    with tempfile.TemporaryDirectory() as place:
        folder = given.reports or Path(place)
        folder.mkdir(exist_ok=True)
        for seed in given.seeds:
            report = folder / f"{seed}.xml"
            command = [sys.executable, "-m", "pytest", "-q", f"--seed={seed}", f"--kills={given.kills}"]
            if not report.exists():
                subprocess.run([*command, f"--junitxml={report}", *rest, *tests], cwd=ROOT, check=False)
        runs = [cases(folder / f"{seed}.xml") for seed in given.seeds]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    seeds = " ".join(map(str, given.seeds))
    command = f"`python docs/promises.py {seeds} --kills {given.kills}`"
    made = f"Made by {command} on {datetime.date.today()} with {versions}."
    PAGE.write_text(written(page, runs, made), encoding="utf-8")
    return int(any(case.outcome == "failed" for run in runs for case in run))


if __name__ == "__main__":
    sys.exit(main())
