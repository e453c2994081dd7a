"""The comparison with rivals: works in words, lines as a table, and what an absent or failing program costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import Place, Program
from benchmarks.work import SHAPES, Work

ROOT = Path(__file__).resolve().parents[1]
PLACE = Place("cpu", None, None, steps=2)


def test_a_work_is_read_and_written() -> None:
    assert Work.parse("lora", "7b") == Work(("lora",), 8, 512)
    assert Work.parse("mixlora*2+lora@2x64", "7b") == Work(("mixlora", "mixlora", "lora"), 2, 64)
    for text in "lora@8x512", "mixlora*2+lora@2x64":
        assert str(Work.parse(text, "7b")) == text
    assert Work.parse("lora*4@2x64", "7b").tokens == 512
    with pytest.raises(ValueError, match="'lore' is none of lora"):
        Work.parse("lore", "7b")


def test_operations_of_a_token_are_those_of_llama_2_7b() -> None:
    assert SHAPES["7b"].flops_per_token(0) == pytest.approx(26.4e9, rel=0.01)
    assert SHAPES["7b"].flops_per_token(512) - SHAPES["7b"].flops_per_token(0) == 6 * 512 * 4096 * 32


def line(program: str, work: str, us: float, **more: object) -> dict:
    return {"program": program, "shape": "7b", "work": work, "us_per_token": us, "gradient_norms": 1.0, **more}


def cells(table: str, program: str, work: str) -> dict[str, str]:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row.startswith("| ")]
    return next(dict(zip(rows[0], row, strict=True)) for row in rows if row[:2] == [program, work])


def test_the_table_takes_medians_of_rounds_and_holds_rivals_against_the_first() -> None:
    found = [{"program": "rate", "shape": "", "flops_per_second": 8e14}]
    found += [line("ours", "lora@8x512", us, peak_gib=30.0, parts_ms={"forward": 1.0}) for us in (50.0, 52.0)]
    found += [line("rival", "lora@8x512", us, peak_gib=gib) for us, gib in ((100.0, 20.0), (104.0, 21.0))]
    table = compare.table(found)
    assert cells(table, "ours", "lora@8x512")["us/token"] == "51.0 (50.0-52.0)"
    assert cells(table, "ours", "lora@8x512")["tokens/s"] == "19,608"
    rival = cells(table, "rival", "lora@8x512")
    assert (rival["times the first"], rival["peak GiB"], rival["gradients"]) == ("0.500", "21.0", "non-zero")
    mfu = SHAPES["7b"].flops_per_token(512) / 102e-6 / 8e14
    assert rival["MFU"] == f"{mfu:.1%}"


def test_fused_adapters_are_held_against_one_on_the_same_rows_or_else_the_same_tokens() -> None:
    by_tokens = compare.table([line("ours", "lora@8x512", 50.0), line("ours", "lora*8@1x512", 100.0)])
    assert cells(by_tokens, "ours", "lora*8@1x512")["times the first"] == "0.500"
    works = {"lora@8x512": 50.0, "lora*8@8x512": 40.0, "lora@1x512": 80.0, "lora*8@1x512": 40.0}
    by_rows = compare.table([line("ours", work, us) for work, us in works.items()])
    assert cells(by_rows, "ours", "lora*8@8x512")["times the first"] == "1.250"
    assert cells(by_rows, "ours", "lora*8@1x512")["times the first"] == "2.000"


@pytest.mark.parametrize(("norms", "said"), [([1.0, 0.0], "**zero**"), ([1.0, None], "not told")])
def test_a_gradient_that_vanished_is_marked(norms: list[float | None], said: str) -> None:
    found = [line("ours", "lora@8x512", 50.0) | {"gradient_norms": norm} for norm in norms]
    assert cells(compare.table(found), "ours", "lora@8x512")["gradients"] == said


def test_rivals_that_are_not_there_are_told_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare.SLICES, "tiny", lambda place: [place.predecessor("tiny", ["lora"])])
    given = Place("cpu", tmp_path / "rivals", tmp_path / "sites", steps=2)
    for place, why in (PLACE, "--rivals and --sites are not given"), (given, "predecessor.py and no"):
        found = compare.measure("tiny", place, 2, 1, tmp_path / "out")
        absent = [line for line in found if "absent" in line]
        assert len(absent) == 1
        assert why in compare.table(found)


def test_what_a_program_printed_before_it_failed_or_was_ended_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = json.dumps({"work": "lora", "us_per_token": 3.0})
    prints = f"print('noise'); print('''{figures}''', flush=True); "

    def programs(place: Place) -> list[Program]:
        fails = Program("fails", "tiny", ("-c", prints + "raise SystemExit('its own error')"), ("lora",))
        hangs = Program("hangs", "tiny", ("-c", prints + "import time; time.sleep(600)"), ("lora",))
        return [fails, hangs, Program("late", "tiny", ("-c", prints), ("lora",))]

    monkeypatch.setitem(compare.SLICES, "tiny", programs)
    found = compare.measure("tiny", PLACE, 1, 0.08, tmp_path)
    kept = [json.loads(text) for text in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert kept == found
    assert [line["program"] for line in found if "us_per_token" in line] == ["fails", "hangs"]
    table = compare.table(found)
    assert "fails tiny: exit status 1: its own error" in table
    assert "hangs tiny: ended after" in table
    assert "late tiny: no time was left" in table


def test_lines_of_rivals_take_the_names_of_the_table() -> None:
    predecessor = PLACE.predecessor("7b", ["lora"])
    assert compare.labelled(predecessor, {"kinds": ["lora", "lora"], "us_per_token": 1.0})["work"] == "lora*2@8x512"
    unsloth = PLACE.unsloth(Path("model"), "false", "0")
    own = compare.labelled(unsloth, {"program": "unsloth", "us_per_token": 1.0, "gradient_norm": 2.0})
    assert (own["work"], own["gradient_norms"]) == ("lora@8x512", 2.0)
    assert own["program"] == "Unsloth, no recompute, dropout 0"


def test_steps_of_ours_and_peft_print_lines_of_one_form(tmp_path: Path) -> None:
    works = ["lora@2x8", "mixlora*2@1x8"]
    lines = []
    for module, wanted in ("benchmarks.step", works), ("benchmarks.peft_step", works[:1]):
        command = [sys.executable, "-m", module, "tiny", *wanted, "--device", "cpu", "--steps", "2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        own = [json.loads(text) for text in done.stdout.splitlines()]
        assert [figures["work"] for figures in own] == wanted
        lines += own
    assert all(figures["gradient_norms"] > 0 for figures in lines)
    assert all(list(figures["parts_ms"]) == ["forward", "backward", "optimizer"] for figures in lines)
    assert len([row for row in compare.table(lines).splitlines() if row.startswith("| ")]) == 5


def test_packed_and_padded_rows_of_real_lengths_have_the_same_gradients() -> None:
    command = [sys.executable, "-m", "benchmarks.packing", "tiny", "packed", "padded", "peft", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--rows", "4", "--batches", "2"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    packed, padded, theirs = (json.loads(text) for text in done.stdout.splitlines())
    assert packed["gradient_norms"] == pytest.approx(padded["gradient_norms"], rel=1e-4)
    assert theirs["gradient_norms"] > 0
    assert packed["work"] == padded["work"] == theirs["work"]
    assert 0 < packed["filled"] < 1
    program = PLACE.packing("tiny", ["packed"])
    assert compare.labelled(program, padded)["program"] == "ours, padded"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=["whole", "sharded"])
def test_steps_on_several_ranks_have_an_efficiency(flags: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.parallel",
        "tiny",
        "lora",
        "mixlora",
        "--device",
        "cpu",
        "--steps",
        "2",
    ]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert [(line["kind"], line["gpus"]) for line in lines[-2:]] == [("lora", 2), ("mixlora", 2)]
    assert all(line["gradient_norm"] > 0 and line["sharded"] == bool(flags) for line in lines)
    assert all(("efficiency" in line) == (line["gpus"] == 2 and not flags) for line in lines)
