"""Any task of lm-evaluation-harness on several adapters at once (the optional package `lm-eval`).

The harness evaluates one model at a time and asks every model the same. So the adapters of one evaluation share a
`Panel`: what the first is asked is computed for all of them in the same batches, and the others find their answers.

Source: https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/api/model.py and models/huggingface.py.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlora.data import encode
from mlora.evaluation.evaluate import BASE, Result
from mlora.evaluation.score import log_likelihoods
from mlora.model.branches import Tree
from mlora.model.memory import in_batches
from mlora.model.multi import MultiAdapterModel
from mlora.tasks import HARNESS

MAX_NEW_TOKENS = 256
"""Of an answer, where a task does not say: the harness's default."""
LONGEST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How tasks spell the tokens of an answer, in the harness's order."""
Pair = tuple[tuple[int, ...], tuple[int, ...]]


class Panel:
    """Adapters that are asked the same.

    Args:
        model: that holds the adapters.
        adapters: names; None for the plain base model.
        batch_size: prompts of each adapter in a forward.
        max_length: tokens of a sequence; None for the model's maximum.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        adapters: Sequence[str | None],
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        self.model, self.adapters, self.batch_size = model, tuple(adapters), batch_size
        self.max_length = max_length or int(model.hf_model.config.get_text_config().max_position_embeddings)
        self._known: dict[str | None, dict[Hashable, Any]] = {name: {} for name in adapters}

    def log_likelihoods(self, adapter: str | None, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return one adapter's log-likelihood of each (context, continuation), and whether that is greedy."""
        return self._answers(adapter, pairs, self._score)

    def texts(self, adapter: str | None, prompts: Sequence[tuple[str, str, int]]) -> list[str]:
        """Return one adapter's continuation of each (prompt, JSON of the harness's settings, number of the draw)."""
        return self._answers(adapter, prompts, self._generate)

    def _answers(
        self,
        adapter: str | None,
        asked: Sequence[Any],
        compute: Callable[[list[Any], list[str | None]], list[list[Any]]],
    ) -> list[Any]:
        """Return an adapter's answers; those to new questions are computed for all adapters.

        An adapter that is asked what the others were not, as by a task that draws its prompts, is asked alone.
        """
        known = self._known[adapter]
        new = list(dict.fromkeys(question for question in asked if question not in known))
        first = not any(question in other for other in self._known.values() for question in new)
        names = list(self.adapters) if first else [adapter]
        for question, answers in zip(new, compute(new, names) if new else [], strict=True):
            for name, answer in zip(names, answers, strict=True):
                self._known[name][question] = answer
        return [known[question] for question in asked]

    def _score(self, pairs: list[Pair], names: list[str | None]) -> list[list[tuple[float, bool]]]:
        """Return for each pair the answer of each adapter; continuations of one context share it."""
        by_context: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        for context, continuation in pairs:
            by_context[context].append(continuation)
        trees = [
            Tree(context, continuations, (0,) * len(continuations), name)
            for context, continuations in by_context.items()
            for name in names
        ]
        found: dict[tuple[str | None, Pair], tuple[float, bool]] = {}
        batches = in_batches(trees, self.batch_size * len(names), partial(log_likelihoods, self.model))
        for asked, answers in zip(trees, (each for batch in batches for each in batch), strict=True):
            for branch, answer in zip(asked.branches, answers, strict=True):
                found[asked.adapter, (tuple(asked.prompt), tuple(branch))] = answer
        return [[found[name, pair] for name in names] for pair in pairs]

    def _generate(self, prompts: list[tuple[str, str, int]], names: list[str | None]) -> list[list[str]]:
        by_settings: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for prompt, settings, draw in prompts:
            by_settings[settings].append((prompt, draw))
        found: dict[tuple[str | None, str, str, int], str] = {}
        for settings, same in by_settings.items():
            asked = [(prompt, draw, name) for prompt, draw in same for name in names]
            batches = in_batches(asked, self.batch_size * len(names), partial(self._continue, json.loads(settings)))
            texts = (text for batch in batches for text in batch)
            for (prompt, draw, name), text in zip(asked, texts, strict=True):
                found[name, prompt, settings, draw] = text
        return [[found[(name, *prompt)] for name in names] for prompt in prompts]

    def _continue(self, settings: dict[str, Any], asked: Sequence[tuple[str, int, str | None]]) -> list[str]:
        generation = dict(settings)
        until = generation.pop("until", None) or []
        longest = next((n for n in [generation.pop(key, None) for key in LONGEST] if n is not None), MAX_NEW_TOKENS)
        temperature = float(generation.pop("temperature", None) or 0)
        if generation.setdefault("do_sample", temperature > 0):
            generation["temperature"] = temperature or 1.0
        room = self.max_length - longest
        if room < 1:
            raise ValueError(f"max_gen_toks {longest} leaves no room for a prompt in {self.max_length} tokens")
        prompts = [encode(self.model.tokenizer, prompt)[-room:] for prompt, _, _ in asked]
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        return self.model.generate(prompts, [name for _, _, name in asked], int(longest), stop=stop, **generation)


class AdapterLM(TemplateLM):
    """One adapter as a model of lm-evaluation-harness.

    Args:
        panel: the adapters that are asked the same, this one among them.
        adapter: name; None for the plain base model.
    """

    def __init__(self, panel: Panel, adapter: str | None) -> None:
        super().__init__()
        self.panel, self.adapter = panel, adapter
        self.tokenizer = panel.model.tokenizer
        self.batch_size = panel.batch_size

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode(self.tokenizer, string, add_bos=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [[_cut(pair, self.panel.max_length) for pair in self._windows(r.args[0])] for r in requests]
        found = iter(self.panel.log_likelihoods(self.adapter, [pair for pairs in windows for pair in pairs]))
        return [sum(next(found)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, draws = [], Counter[tuple[str, str]]()
        for prompt, settings in (r.args for r in requests):
            key = (prompt, json.dumps(settings, sort_keys=True))
            prompts.append((*key, draws[key]))
            draws[key] += bool(settings.get("do_sample"))  # else repeats are one
        return self.panel.texts(self.adapter, prompts)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [_cut((context, continuation), self.panel.max_length) for _, context, continuation in requests]
        return self.panel.log_likelihoods(self.adapter, pairs)

    def _windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text)
        return map(
            make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, self.panel.max_length, 1)
        )


def evaluate(
    model: MultiAdapterModel,
    adapters: Sequence[str | None],
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_manager: TaskManager | None = None,
    **settings: Any,
) -> dict[str | None, dict[str, Any]]:
    """Evaluate adapters side by side and return what `lm_eval.simple_evaluate` returns for each.

    Args:
        model: that holds the adapters.
        adapters: names; None for the plain base model.
        tasks: names, files, or settings of tasks and groups, as the harness takes them.
        batch_size: prompts of each adapter in a forward.
        limit: rows of each task; None for all.
        num_fewshot: solved rows before each prompt; None for what the task says.
        task_manager: that knows tasks of your own.
        settings: what else `lm_eval.simple_evaluate` takes.
    """
    panel = Panel(model, adapters, batch_size)
    manager = task_manager or TaskManager()
    return {
        name: evaluator.simple_evaluate(
            AdapterLM(panel, name),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            **settings,
        )
        for name in adapters
    }


def results(found: Mapping[str | None, Mapping[str, Any]], limit: int | None = None) -> list[Result]:
    """Return the numbers of an evaluation as rows of the results table."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    for adapter, evaluation in found.items():
        for task, measured in evaluation["results"].items():
            for key, value in measured.items():
                metric, _, filtered = key.partition(",")
                if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = measured.get(f"{metric}_stderr,{filtered}")
                name = metric if filtered == "none" else key
                version = int(float(evaluation["versions"].get(task, 0)))
                n = int(evaluation["n-samples"][task]["effective"])
                rows.append(
                    Result(
                        BASE if adapter is None else adapter,
                        task,
                        version,
                        HARNESS,
                        name,
                        float(value),
                        error if isinstance(error, float) else None,
                        n,
                        limit,
                        date,
                    )
                )
    return rows


def _cut(pair: tuple[Sequence[int], Sequence[int]], max_length: int) -> Pair:
    """Shorten a context from the left to what the model reads: all but the last token of the continuation."""
    context, continuation = pair
    room = max_length + 1 - len(continuation)
    return tuple(context[max(len(context) - room, 0) :]), tuple(continuation)
