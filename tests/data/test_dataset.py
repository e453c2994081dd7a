"""Training rows and questions: mixtures, limits, bad rows, instruction formats."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mlora.data import NO_LABEL, DataError, Sample, load_questions, load_training_samples
from mlora.tasks import known_tasks
from tests.tasks.rows import ARC, ROWS

Tok = PreTrainedTokenizerBase


def write(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def answers(tokenizer: Tok, sample: Sample) -> list[str]:
    return tokenizer.convert_ids_to_tokens([label for label in sample.labels if label != NO_LABEL])


def test_mixture_is_concatenated(tmp_path: Path, characters: Tok) -> None:
    for task in ("arc-e", "boolq"):
        write(tmp_path / task / "train.jsonl", *[ROWS[task]] * 3)
    separate = f"{tmp_path / 'arc-e'}; {tmp_path / 'boolq' / 'train.jsonl'}"
    for data in (str(tmp_path), separate):
        samples = load_training_samples("arc-e; boolq", data, characters, 256, limit=2)
        assert [sample.task for sample in samples] == ["arc-e", "arc-e", "boolq", "boolq"]
        assert "".join(answers(characters, samples[0])).strip() == "C"
        assert "".join(answers(characters, samples[-1])).strip() == "true"
        assert samples.report.rows == 4


@pytest.mark.parametrize(
    ("tasks", "data", "message"),
    [
        ("arc-e;boolq", "{}/a.jsonl;{}/b.jsonl;{}/c.jsonl", "3 data paths for 2 tasks"),
        ("arc-e;boolq", "{}", "no subfolder boolq; .* There are: arc-e"),
        ("boolq", "{}/arc-e", "no file for the split 'train' .*; there are: test.jsonl"),
        ("boolq", "{}/missing.jsonl", "missing.jsonl: no such file"),
        ("casual", "", "needs `data`"),
    ],
)
def test_data_that_does_not_fit_the_tasks(tmp_path: Path, characters: Tok, tasks: str, data: str, message: str) -> None:
    write(tmp_path / "arc-e" / "test.jsonl", ARC)
    with pytest.raises(DataError, match=message):
        load_training_samples(tasks, data.replace("{}", str(tmp_path)), characters, 64)


def test_a_bad_row_is_named_or_skipped(tmp_path: Path, characters: Tok) -> None:
    data = write(tmp_path / "t.jsonl", ARC, {**ARC, "answerKey": "Z"}, "{nonsense", ARC)
    with pytest.raises(DataError, match=r"t.jsonl, line 2: field 'answerKey' is 'Z', expected one of A, B, C, D"):
        load_training_samples("arc-e", data, characters, 256)
    samples = load_training_samples("arc-e", data, characters, 256, on_bad_row="skip")
    assert (len(samples), samples.report.rows, samples.report.bad_rows) == (2, 4, 2)
    assert "line 3: is not JSON" in samples.report.problems[1]
    assert len(load_questions("arc-e", data, on_bad_row="skip")) == 2


def test_the_report_counts_what_the_cutoff_does(tmp_path: Path, characters: Tok) -> None:
    short, long = {"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b" * 99}
    samples = load_training_samples("casual", write(tmp_path / "t.jsonl", short, long), characters, 20)
    assert (len(samples), samples.report.truncated, samples.report.dropped) == (1, 1, 1)
    assert str(samples.report) == "2 rows read, 1 prompt truncated, 1 dropped because their answer exceeds the cutoff"
    with pytest.raises(DataError, match="no data rows in .*l.jsonl; 1 row lost the answer to cutoff_len 20"):
        load_training_samples("casual", write(tmp_path / "l.jsonl", long), characters, 20)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_rows_is_an_error(tmp_path: Path, characters: Tok, content: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="no data rows in .*train.jsonl"):
        load_training_samples("boolq", str(path), characters, 64)
    with pytest.raises(DataError, match="no data rows in .*train.jsonl"):
        load_questions("boolq", str(path))


def test_alpaca_columns(tmp_path: Path, characters: Tok) -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    data = write(tmp_path / "t.jsonl", row, {**row, "input": ""}, {**row, "output": ""})
    samples = load_training_samples("casual", data, characters, 512, prompt="template/alpaca.json")
    assert answers(characters, samples[0]) == ["2", "</s>"]
    assert answers(characters, samples[2]) == ["</s>"]
    texts = ["".join(characters.convert_ids_to_tokens(sample.input_ids)) for sample in samples]
    assert texts[0].startswith("<s>Below is an instruction")
    assert texts[0].endswith("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2</s>")
    assert texts[1].endswith("### Instruction:\nAdd.\n\n### Response:\n2</s>")
    default = load_training_samples("casual", data, characters, 512)
    assert "".join(characters.convert_ids_to_tokens(default[1].input_ids)) == (
        "<s>### Instruction:\nAdd.\n\n### Output:\n2</s>"
    )


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yo"},
                {"role": "user", "content": "so"},
                {"role": "assistant", "content": "ok"},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "yo"},
                {"from": "human", "value": "so"},
                {"from": "gpt", "value": "ok"},
            ]
        },
    ],
)
def test_every_assistant_turn_is_a_label(tmp_path: Path, smollm2: Tok, characters: Tok, row: dict[str, Any]) -> None:
    data = write(tmp_path / "t.jsonl", row)
    (sample,) = load_training_samples("casual", data, characters, 512)
    assert answers(characters, sample) == ["y", "o", "</s>", "o", "k", "</s>"]
    (sample,) = load_training_samples("casual", data, smollm2, 512)
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert smollm2.decode(sample.input_ids).startswith(text)
    assert smollm2.decode([x for x in sample.labels if x != NO_LABEL]) == "yo<|im_end|>\nok<|im_end|>\n"


def test_plain_text_is_learnt_whole(tmp_path: Path, characters: Tok) -> None:
    (sample,) = load_training_samples("casual", write(tmp_path / "t.jsonl", {"text": "abc"}), characters, 512)
    assert answers(characters, sample) == ["a", "b", "c", "</s>"]
    (sample,) = load_training_samples("casual", write(tmp_path / "t.jsonl", {"text": "abcdef"}), characters, 4)
    assert sample.truncated


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "field 'instruction' is missing, and so are messages, conversations and text; .* question"),
        ({"instruction": "a"}, "field 'output' is None, expected text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "field 'input' is 3"),
        ({"messages": []}, "field 'messages' is .., expected a list of turns"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"messages": [{"role": "user"}]}, r"field 'messages\[0\].content' is None"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, r"field 'conversations\[0\].from' is 'tool'"),
    ],
)
def test_unusable_instruction_rows(tmp_path: Path, characters: Tok, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_training_samples("casual", write(tmp_path / "t.jsonl", row), characters, 64)


def test_real_data(shared: Path, smollm2: Tok) -> None:
    data = str(shared / "data")
    samples = load_training_samples("arc-c;boolq;winogrande", data, smollm2, 512, limit=20)
    assert [sample.task for sample in samples] == ["arc-c"] * 20 + ["boolq"] * 20 + ["winogrande"] * 20
    assert {len(answers(smollm2, sample)) for sample in samples} == {1}
    alpaca = load_training_samples("casual", f"{data}/alpaca;{data}/alpaca-gpt4", smollm2, 512, limit=20)
    assert len(alpaca) == 40
    assert all(sample.labels[-1] == smollm2.eos_token_id for sample in alpaca)


ODD_VALUES: list[Any] = [None, "", "\ud800", 0, -7, 1e300, True, [], {}, [None], {"text": "x"}, "[" * 2000, "x" * 5000]


def mutated(row: Mapping[str, Any], draw: random.Random) -> object:
    """Return a row with one thing wrong, possibly."""
    row = json.loads(json.dumps(row))
    field = draw.choice(list(row))
    kind = draw.randrange(5)
    if kind == 0:
        del row[field]
    elif kind == 1:
        row[field] = draw.choice(ODD_VALUES)
    elif kind == 2 and isinstance(row[field], dict):
        row[field][draw.choice(list(row[field]))] = draw.choice(ODD_VALUES)
    elif kind == 3 and isinstance(row[field], list):
        row[field][0] = draw.choice(ODD_VALUES)
    else:
        text = json.dumps(row)
        cut = draw.randrange(len(text))
        return text[:cut] + draw.choice(["", "\x00", "}", '"', "\\"]) + text[cut + draw.randrange(3) :]
    return row


def test_mutated_rows_raise_nothing_but_data_errors(tmp_path: Path, characters: Tok) -> None:
    draw = random.Random(0)
    rows = ROWS | {
        "casual": {"instruction": "a", "input": "b", "output": "c"},
        "casual ": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    }
    wrong = 0
    for number in range(300):
        task = draw.choice(list(rows))
        name, path = task.strip(), tmp_path / f"{number}.jsonl"
        write(path, mutated(rows[task], draw))
        try:
            load_training_samples(name, str(path), characters, 256)
            if name in known_tasks():
                load_questions(name, str(path))
        except DataError as error:
            wrong += 1
            assert path.name in str(error)
            assert len(str(error)) < 600 + len(str(path))
    assert wrong > 150
