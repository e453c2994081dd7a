"""`launch.py evaluate --protocol lm-eval`: tasks of lm-evaluation-harness, several adapters at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlora.config import ConfigError, Problem
from mlora.config.errors import did_you_mean, show
from mlora.evaluation.evaluate import BASE, conditions
from mlora.model.multi import MultiAdapterModel
from mlora.network import ask_hub, why_offline
from mlora.runs.folder import RunFolder
from mlora.tasks import HARNESS
from mlora.training.stop import Deadline, Paused
from mlora.wording import install

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)


def task_manager(tasks: Sequence[str], folder: str | None) -> TaskManager:
    """Return what knows the harness's tasks.

    Args:
        tasks: names of tasks and groups that are wanted.
        folder: of task files besides the harness's own.

    Raises:
        ConfigError: the harness is not installed, or has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        message = f"{HARNESS} needs lm-evaluation-harness: {install('eval')}"
        raise ConfigError("--protocol", [Problem("", message)]) from None
    manager = TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            hint = did_you_mean(name, sorted(known))
            message = f"{show(name)} is no task of lm-evaluation-harness{hint}; `lm-eval ls tasks` lists them"
            raise ConfigError("--tasks", [Problem("", message)])
    return manager


def assess(
    model: MultiAdapterModel,
    adapters: Sequence[str | None],
    tasks: Sequence[str],
    manager: TaskManager,
    folder: RunFolder,
    *,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    deadline: Deadline,
    keep: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Evaluate task by task, write each task's results as soon as they exist, and return them and what failed.

    Args:
        model: that holds the adapters.
        adapters: names; None for the plain base model.
        tasks: names of tasks and groups.
        manager: that knows them.
        folder: of the results.
        batch_size: prompts of each adapter in a forward.
        limit: rows of each task; None for all.
        num_fewshot: solved rows before each prompt; None for what the task says.
        deadline: end of the time limit, looked at between tasks.
        keep: whether results of the same adapters under the same conditions are kept rather than found again.

    Raises:
        Paused: the time is up; the results so far are written.
    """
    from mlora.evaluation.lm_eval import evaluate, results

    all_results: list[dict[str, Any]] = []
    failures: list[str] = []
    for task in tasks:
        if deadline.passed:
            raise Paused("time is up; all results so far are written")
        asked = f"{task}, limit {limit}, few-shot {num_fewshot}"
        under = {name: conditions(model, name, asked) for name in adapters}
        kept = {name: _known(folder, name, under[name]) if keep else [] for name in adapters}
        missing = [name for name in adapters if not kept[name]]
        try:
            found = {}
            if missing:
                ask_hub()  # which has the rows of nearly all tasks
                found = evaluate(
                    model,
                    missing,
                    [task],
                    batch_size=batch_size,
                    limit=limit,
                    num_fewshot=num_fewshot,
                    task_manager=manager,
                )
            for name in missing:
                own = [replace(r, conditions=under[name]).as_dict() for r in results({name: found[name]}, limit)]
                kept[name] = own
                for result in own:
                    folder.add_result(result)
        except Exception as error:  # whatever one task fails by, the others' results must not be lost
            log.exception("evaluation of %s failed", task)
            offline = isinstance(error, OSError) and why_offline()
            reason = f"{offline}, and no cached copy was found" if offline else f"{type(error).__name__}: {error}"
            failures.append(f"evaluation of {task} failed: {reason}")
        all_results += [result for name in adapters for result in kept[name]]
    return all_results, failures


def _known(folder: RunFolder, adapter: str | None, under: dict[str, str | None]) -> list[dict[str, Any]]:
    name = BASE if adapter is None else adapter
    return [r for r in folder.read_results() if r["adapter"] == name and r.get("conditions") == under]
