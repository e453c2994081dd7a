"""`launch.py evaluate`: adapters that exist, or the base model alone, on tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mlora.config import ConfigError, Problem
from mlora.config.names import name_problem, same_folder
from mlora.data import split_paths, task_names
from mlora.evaluation import Examination, Library, check_heads
from mlora.model import load
from mlora.model.files import CONFIG
from mlora.model.multi import MultiAdapterModel
from mlora.report.table import results_table
from mlora.runs import harness
from mlora.runs.assess import assess, of_base
from mlora.runs.folder import RunFolder
from mlora.runs.run import RunError
from mlora.tasks import HARNESS, Protocol, find_task
from mlora.training.stop import Deadline
from mlora.wording import launcher


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated, the flags of `launch.py evaluate` under their own names.

    Attributes:
        base_model: local folder, hub id, GGUF file, or "smollm2".
        tasks: names joined by ";".
        adapter: folders, or NAME=FOLDER; none evaluates the base model alone.
        protocol: ways to score; none takes each task's first. "lm-eval" alone: tasks of lm-evaluation-harness.
        num_fewshot: solved rows before each prompt of the harness's tasks; None for what a task says.
        data_path: local data, as for `gen`; a folder of task files for the harness.
        dir: folder that results are written to.
        limit: rows of each task; None for all.
        batch_size: rows of each adapter in a forward.
        cutoff_len: tokens of a prompt and its longest choice; -1 for the base model's maximum.
        evaluate_base: evaluate the base model beside adapters.
        samples: write what is answered to each row.
        overwrite: find results again that are there.
        dtype, quantize, attn_impl, revision, trust_remote_code: of the base model.
        time_limit: minutes; None for no limit.
        log_file, debug: as for `launch.py run`.
    """

    base_model: str
    tasks: str
    adapter: tuple[str, ...] = ()
    protocol: tuple[Protocol | Literal["lm-eval"], ...] = ()
    num_fewshot: int | None = None
    data_path: str | None = None
    dir: str = "."
    limit: int | None = None
    batch_size: int = 16
    cutoff_len: int = 512
    evaluate_base: bool = False
    samples: bool = False
    overwrite: bool = False
    dtype: str | None = None
    quantize: str | None = None
    attn_impl: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    time_limit: float | None = None
    log_file: str = "mlora.log"
    debug: bool = False

    def run(self) -> None:
        """Evaluate, write results.json and print the table.

        Raises:
            ConfigError: a folder is no adapter, or names collide.
            RunError: a task failed, the others are done.
        """
        folder = RunFolder(self.dir)
        folder.read_results()
        places = _named(self.adapter)
        held = self._by_harness if HARNESS in self.protocol else self._by_protocols
        results, failures = held(folder, places, Deadline(self.time_limit))
        if results:
            print(results_table(results), flush=True)
        if failures:
            raise RunError("\n".join(failures))

    def _by_protocols(
        self, folder: RunFolder, places: Mapping[str, Path], deadline: Deadline
    ) -> tuple[list[dict[str, Any]], list[str]]:
        if self.num_fewshot is not None:
            raise ConfigError("--num_fewshot", [Problem("", f"only with --protocol {HARNESS}")])
        wanted = self._wanted(list(places))
        origin = load.find(self.base_model, self.revision, self.trust_remote_code)
        tokenizer = load.load_tokenizer(origin)
        longest = int(load.load_config(origin).get_text_config().max_position_embeddings)
        library = Library(tokenizer, longest if self.cutoff_len == -1 else self.cutoff_len)
        for examination in wanted:  # bad data is found before the weights are read
            library.questions(examination)
        model = self._model(places)
        model.use_tokenizer(tokenizer)
        check_heads(model, wanted)
        return assess(
            model, wanted, folder, library, deadline=deadline, keep=not self.overwrite, with_samples=self.samples
        )

    def _by_harness(
        self, folder: RunFolder, places: Mapping[str, Path], deadline: Deadline
    ) -> tuple[list[dict[str, Any]], list[str]]:
        if len(self.protocol) > 1:
            raise ConfigError("--protocol", [Problem("", f"{HARNESS} cannot be combined with others")])
        if self.samples:
            raise ConfigError("--samples", [Problem("", f"cannot be combined with --protocol {HARNESS}")])
        tasks = self._names()
        manager = harness.task_manager(tasks, self.data_path)
        model = self._model(places)
        headed = [name for name in places if model.num_labels(name) is not None]
        if headed:
            raise _bad(f"{headed[0]} has a classification head; the harness's tasks need none")
        adapters: list[str | None] = [*places, *([None] if self.evaluate_base or not places else [])]
        return harness.assess(
            model,
            adapters,
            tasks,
            manager,
            folder,
            batch_size=self.batch_size,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            deadline=deadline,
            keep=not self.overwrite,
        )

    def _names(self) -> list[str]:
        names = list(dict.fromkeys(task_names(self.tasks)))
        if not names:
            raise ConfigError("--tasks", [Problem("", f"names no task; `{launcher()} avail` lists them")])
        return names

    def _wanted(self, adapters: Sequence[str]) -> list[Examination]:
        names = self._names()
        paths = dict(zip(names, split_paths(self.data_path, names), strict=True))
        protocols: Sequence[Protocol | None] = [p for p in self.protocol if p != HARNESS] or (None,)
        tasks = {find_task(name, protocol): paths[name] for name in names for protocol in protocols}
        examined: Sequence[str | None] = adapters or [None]
        wanted = [
            Examination(adapter, task.name, path, self.limit, self.batch_size, task.protocol)
            for task, path in tasks.items()
            for adapter in examined
        ]
        return [*wanted, *of_base(wanted)] if self.evaluate_base and adapters else wanted

    def _model(self, places: Mapping[str, Path]) -> MultiAdapterModel:
        """Return the base model with the adapters of these folders."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = MultiAdapterModel.from_pretrained(
            self.base_model,
            dtype=load.DTYPES[self.dtype or ("bf16" if device == "cuda" else "fp32")],
            device=device,
            quantization=self.quantize,
            attn_implementation=self.attn_impl,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        for name, place in places.items():
            model.load_adapter(place, name, allow_pickle=True)
        return model


def _named(given: Sequence[str]) -> dict[str, Path]:
    """Return adapters' folders by the names that results give them."""
    places: list[tuple[str, Path]] = []
    for word in given:
        name, equals, folder = word.partition("=")
        place = Path(folder if equals and not Path(word).exists() else word).expanduser()
        name = name if equals and not Path(word).exists() else place.resolve().name
        if not (place / CONFIG).exists():
            raise _bad(f"{place}: no such adapter folder: there is no {CONFIG} in it")
        problem = name_problem(name)
        if problem is not None:
            raise _bad(f"{word}: {problem}; NAME=FOLDER gives it another")
        places.append((name, place))
    pair = same_folder(name for name, _ in places)
    if pair is not None:
        raise _bad(f"two adapters are named {pair[0]}; NAME=FOLDER gives one another")
    return dict(places)


def _bad(message: str) -> ConfigError:
    return ConfigError("--adapter", [Problem("", message)])
