"""The one model behind the page and the endpoint: whose turn it is, and which adapters are loaded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlora.generation.form import Form, find_form
from mlora.generation.opened import ModelOptions, adapters_within, free_name, load_answerer, open_model
from mlora.generation.sampling import Sampling
from mlora.model.batch import Batch
from mlora.model.errors import ModelError
from mlora.model.generate import Piece
from mlora.model.multi import MultiAdapterModel

log = logging.getLogger(__name__)


class Routes(NamedTuple):
    """What one router did with a text.

    Attributes:
        chosen: [T, E] bool, the experts that computed each token.
        shares: [T, E] the router's probabilities.
    """

    chosen: torch.Tensor
    shares: torch.Tensor


class Engine:
    """A model with adapters that answers one request at a time; others wait, in no promised order.

    All answers of a request, by the base model and by adapters, are computed in one batch.

    Args:
        options: what is loaded; a folder of adapter folders (a run's) among `lora_weights` offers those.
        template: form of prompts where a request names none.

    Raises:
        ModelError: something cannot be loaded.
    """

    def __init__(self, options: ModelOptions, template: str | None = None) -> None:
        given = [str(path) if (path := Path(words).expanduser()).exists() else words for words in options.lora_weights]
        self._parents = [Path(words) for words in given if adapters_within(Path(words))]
        direct = tuple(words for words in given if Path(words) not in self._parents)
        self.model: MultiAdapterModel
        self.model, self._folders = open_model(replace(options, lora_weights=direct))
        self.base = self.model.origin.given
        self.form = find_form(template, self.model.tokenizer)
        self._turn = threading.Lock()

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self.model.adapters)

    def offered(self) -> dict[str, Path]:
        """Return every adapter that may be loaded, by name: those given at the start and those within given folders.

        An adapter keeps its name, whatever comes and goes beside it.
        """
        folders = dict(self._folders)
        known = {folder.resolve() for folder in folders.values()}
        inside = [folder.resolve() for parent in self._parents for folder in adapters_within(parent)]
        for folder in inside:
            if folder not in known:
                folders[free_name(folder.name, {*folders, self.base})] = folder
        self._folders = folders  # a new one, since requests look at the same time
        return {name: folder for name, folder in folders.items() if name in self.adapters or folder.exists()}

    def load(self, name: str) -> None:
        """Load an adapter that was offered.

        Raises:
            ModelError: it was not, is loaded already, or its folder cannot be read.
        """
        with self._held():
            self._load(name)

    def _load(self, name: str) -> None:
        offered = self.offered()
        if name not in offered:
            raise ModelError(f"adapter {name!r} is not offered; offered: {', '.join(offered) or 'none'}")
        load_answerer(self.model, name, offered[name])

    def unload(self, name: str) -> None:
        """Forget a loaded adapter."""
        with self._held():
            self.model.remove_adapter(name)

    def mixtures(self) -> list[str]:
        """Return the names of loaded adapters that have routers."""
        return [name for name, method in self.model.adapters.items() if hasattr(method, "num_experts")]

    # -- answers -------------------------------------------------------------------------------------------------

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        sampling: Sampling,
        cancelled: Callable[[], bool] = lambda: False,
        **generation: Any,
    ) -> Iterator[Piece]:
        """Yield the answers' tokens as they come; leaving the loop, or `cancelled`, stops them.

        Adapters that are offered and not loaded are loaded.

        Raises:
            ModelError: an adapter is not offered or cannot be read, or a prompt is too long.
        """
        with self._held(cancelled) as held:
            if not held:
                return
            for name in {name for name in adapters if name is not None} - self.model.adapters.keys():
                self._load(name)
            pieces = self.model.stream(prompts, adapters, **sampling.keywords() | generation)
            try:
                for piece in pieces:
                    yield piece
                    if cancelled():
                        return
            finally:
                pieces.close()  # type: ignore[attr-defined]

    @torch.no_grad()
    def routes(self, tokens: Sequence[int], adapter: str) -> Mapping[str, Routes]:
        """Return what each router of a mixture does with a text, by its place, from one forward of the whole text."""
        with self._held():
            ids = torch.tensor([list(tokens)])
            batch = Batch.from_rows(ids, torch.ones_like(ids), None, [adapter]).to(self.model.device)
            found = self.model(batch)[adapter].router_logits
            method: Any = self.model.adapters[adapter]
        return {
            site: Routes(method.chosen(logits).bool().cpu(), logits.softmax(-1).cpu()) for site, logits in found.items()
        }

    @contextmanager
    def _held(self, cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Wait for one's turn; yields False where somebody cancelled it meanwhile."""
        while not (held := self._turn.acquire(timeout=0.1)) and not cancelled():
            pass
        try:
            yield held
        finally:
            if held:
                self._turn.release()


def form_of(engine: Engine, name: str | None) -> Form:
    """Return the form of a name, the engine's own where there is none."""
    return engine.form if name in (None, engine.form.name) else find_form(name, engine.model.tokenizer)
