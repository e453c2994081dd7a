"""`launch.py gen`: which adapters a template and tasks make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlora.adapters import METHODS
from mlora.config import ConfigError, RunConfig, load_config
from mlora.config.generate import generate
from mlora.config.templates import ROOT, find_template, template_names


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jobs(config: RunConfig) -> list[tuple[str, str, str | None]]:
    return [(job.name, job.task_name, job.data) for job in config.lora]


def test_one_adapter_for_each_task() -> None:
    config = generate("mixlora", "arc-e;arc-c;yahma/alpaca-cleaned")
    assert jobs(config) == [
        ("arc_e_0", "arc-e", None),
        ("arc_c_1", "arc-c", None),
        ("casual_2", "casual", "yahma/alpaca-cleaned"),
    ]
    assert config.lora[2].prompt == "alpaca"
    assert {job.method.method for job in config.lora} == {"mixlora"}
    assert load_config("mlora.json") == config
    assert Path("mlora.json").read_text().startswith('{\n    "cutoff_len"')
    assert Path("mlora.json").read_text().endswith("}\n")


def test_one_adapter_for_all_tasks() -> None:
    assert jobs(generate("mixlora", "arc-c;arc-e;boolq", multi_task=True)) == [
        ("multi_task_0", "arc-c;arc-e;boolq", None)
    ]
    named = generate("mixlora", "arc-c;arc-e", multi_task=True, adapter_name="mixlora")
    assert jobs(named) == [("mixlora_0", "arc-c;arc-e", None)]


def test_appending_counts_on_and_keeps_the_file() -> None:
    generate("mixlora", "arc-e", overrides={"cutoff_len": 64})
    config = generate("lora", "arc-e;piqa", append=True)
    assert [job.name for job in config.lora] == ["arc_e_0", "arc_e_1", "piqa_2"]
    assert [job.method.method for job in config.lora] == ["mixlora", "lora", "lora"]
    assert config.cutoff_len == 64
    assert len(generate("lora", "piqa", "none.json", append=True).lora) == 1


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("glue:foo", '"glue:foo" is no task, no file or folder, and no data set of the hub, which is owner/name; did '),
        ("sst", 'did you mean "glue:sst2"'),
        ("arc", 'did you mean "arc-e" or "arc-c" or "'),
        ("nope", "launch.py avail` lists the tasks"),
        ("squad", "owner/name"),
        ("a/b/c", "no such file or folder"),
        ("arc-e;arc-e", '"arc-e" is named twice'),
    ],
)
def test_a_task_that_cannot_be_meant(tasks: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        generate("lora", tasks)
    assert said in str(caught.value) and "--tasks" in str(caught.value)


def test_overrides_replace_the_templates_values() -> None:
    given: dict[str, Any] = {
        "cutoff_len": 32,
        "lr": 1e-3,
        "warmup_steps": 4.0,
        "group_by_length": True,
        "batch_size": None,
    }
    config = generate("lora", "piqa;boolq", overrides=given)
    assert config.cutoff_len == 32
    for job in config.lora:
        assert (job.lr, job.warmup_steps, job.group_by_length, job.batch_size) == (1e-3, 4, True, 16)


def test_a_template_with_two_adapters_makes_two_for_each_task() -> None:
    template = json.loads(find_template("lora").read_text())
    template["lora"].append({**template["lora"][0], "name": "small", "r": 4})
    Path("two.json").write_text(json.dumps(template))
    assert [job.name for job in generate("two.json", "piqa;boolq").lora] == ["piqa_0", "boolq_1", "piqa_2", "boolq_3"]


def test_data_by_position_or_by_folder() -> None:
    for name in ["arc-e", "piqa", "other"]:
        Path("data", name).mkdir(parents=True)
    assert [d for _, _, d in jobs(generate("lora", "arc-e;piqa", data_path="x;y/z"))] == ["x", "y/z"]
    assert [d for _, _, d in jobs(generate("lora", "arc-e;piqa", data_path="data"))] == ["data/arc-e", "data/piqa"]
    assert [d for _, _, d in jobs(generate("lora", "piqa", data_path="data"))] == ["data/piqa"]
    assert [d for _, _, d in jobs(generate("lora", "boolq", data_path="data/other"))] == ["data/other"]
    mixed = generate("lora", "arc-e;piqa", data_path="data", multi_task=True)
    assert jobs(mixed) == [("multi_task_0", "arc-e;piqa", "data/arc-e;data/piqa")]
    assert jobs(generate("lora", "casual", data_path="rows.jsonl")) == [("casual_0", "casual", "rows.jsonl")]
    for tasks, path in [("arc-e;boolq", "data"), ("arc-e;boolq", "a;b;c"), ("arc-e", "a;b")]:
        with pytest.raises(ConfigError, match="--data_path: "):
            generate("lora", tasks, data_path=path)


def test_subsets_lose_their_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlora.tasks import TASKS

    if ("classification", "glue:sst2") not in TASKS:
        monkeypatch.setitem(TASKS, ("classification", "glue:sst2"), TASKS["letter", "piqa"])
    Path("data", "glue-sst2").mkdir(parents=True)
    assert jobs(generate("lora", "glue:sst2", data_path="data")) == [("sst2_0", "glue:sst2", "data/glue-sst2")]
    with pytest.raises(ConfigError, match='did you mean "glue:sst2"'):
        generate("lora", "sst2")


@pytest.mark.parametrize("tasks", ["arc_e", "hellaswg", "ARC-E", "missing.json", "./missing", "", " ; ", "casual"])
def test_tasks_that_cannot_be_meant(tasks: str) -> None:
    with pytest.raises(ConfigError, match="--tasks: "):
        generate("lora", tasks)
    assert not Path("mlora.json").exists()


def test_a_local_file_is_data_whatever_its_name() -> None:
    Path("arc_e").mkdir()
    Path("rows.jsonl").touch()
    assert jobs(generate("lora", "arc_e;rows.jsonl;me/squad;me/squad:v2")) == [
        ("casual_0", "casual", "arc_e"),
        ("casual_1", "casual", "rows.jsonl"),
        ("casual_2", "casual", "me/squad"),
        ("casual_3", "casual", "me/squad:v2"),
    ]


def test_nothing_is_written_where_the_result_would_be_wrong() -> None:
    generate("lora", "piqa")
    before = Path("mlora.json").read_text()
    for wrong in [{"lr": -1.0}, {"scheduler_type": "x"}, {"micro_batch_size": 5}]:
        with pytest.raises(ConfigError, match="mlora.json: lora"):
            generate("lora", "piqa", overrides=wrong)
    with pytest.raises(ConfigError, match="lora\\[0\\].name"):
        generate("lora", "piqa", adapter_name="../x")
    assert Path("mlora.json").read_text() == before


def test_templates_by_name_or_path() -> None:
    for spelling in ["lora", "lora.json", "templates/lora.json"]:
        assert find_template(spelling).name == "lora.json"
    for spelling in ["mixlora_dynamic", "mixlora-dynamic", "template/mixlora-dynamic.json"]:
        assert find_template(spelling).name == "mixlora_dynamic.json"
    with pytest.raises(ConfigError, match='did you mean "mixlora"'):
        find_template("mixlra")


MIXTURE = {"r": 16, "lora_alpha": 32, "num_experts": 8}
PUBLISHED = {
    "lora": ("lora", {"r": 80, "lora_alpha": 160, "use_dora": False}),
    "dora": ("lora", {"r": 80, "lora_alpha": 160, "use_dora": True}),
    "mixlora": ("mixlora", MIXTURE | {"top_k": 2, "use_dora": False}),
    "mixdora": ("mixlora", MIXTURE | {"top_k": 2, "use_dora": True}),
    "mixlora_dynamic": ("mixlora-dynamic", MIXTURE | {"top_p": 0.8}),
    "mixlora_switch": ("mixlora-switch", MIXTURE | {"expert_capacity": 32}),
    "loramoe": ("loramoe", {"r": 24, "lora_alpha": 48, "num_experts": 6, "target_modules": "mlp"}),
    "mola": ("mola", {"r": 10, "lora_alpha": 20, "num_experts": 8, "top_k": 2}),
}
"""Method and settings of each template: those that the predecessors ship."""


def test_every_method_has_a_template() -> None:
    assert template_names() == sorted(PUBLISHED)
    assert {method for method, _ in PUBLISHED.values()} == METHODS.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_hold_the_published_settings(name: str) -> None:
    config = generate(name, "arc-e;piqa")
    method, settings = PUBLISHED[name]
    assert (config.cutoff_len, config.save_step, len(config.lora)) == (512, 1000, 2)
    for job in config.lora:
        assert job.method.method == method and job.method.lora_dropout == 0.05
        assert {key: getattr(job.method, key) for key in settings} == settings
        assert (job.lr, job.optim, job.scheduler_type, job.num_epochs) == (2e-4, "adamw", "constant", 2)
        assert (job.batch_size, job.micro_batch_size, job.evaluate_batch_size) == (16, 8, 16)
