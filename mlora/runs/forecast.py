"""What a training will take of the device's memory, and how much of it backward should rather compute again."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

from mlora.model.multi import MultiAdapterModel
from mlora.model.recompute import Recompute, What
from mlora.model.rehearsal import Footprint, Rehearsal
from mlora.model.sizes import sizes_of
from mlora.report.table import wrapped
from mlora.training.job import optimizer_bytes
from mlora.training.order import Order, forwards, heaviest
from mlora.training.trainer import LOOKED_AT

USABLE = 0.93
"""Share of the free memory that a choice may fill: allocators leave gaps, libraries take a little for themselves."""
COMPILED_FROM = 10**9
"""Parameters of a base model from which compiling pays off, unless a run is short."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    """The memory of a training.

    Attributes:
        footprint: of its heaviest forward and backward.
        recompute: what backward computes again.
        device: "cpu" or "cuda".
        free: bytes that there are.
        instead: what the training would take in all if something were changed, where there is too little.
    """

    footprint: Footprint
    recompute: Recompute
    device: str
    free: int
    instead: Mapping[str, int] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.footprint.total <= self.free

    def __str__(self) -> str:
        parts = self.footprint
        lines = [
            f"memory: {_size(parts.total)} of {_size(self.free)} free on {self.device}: "
            f"base model {_size(parts.base)}, adapters and optimizer {_size(parts.adapters)}, "
            f"activations {_size(parts.activations)}, "
            f"the rest {_size(parts.rest)}; backward computes {self.recompute} again"
        ]
        if not self.fits:
            changes = [f"{change} would take {_size(total)}" for change, total in self.instead.items()]
            changes.append("--quantize 4bit, a lower train_lora_simultaneously_num or optim adamw8bit take less, too")
            lines.append(f"too little memory: micro-batches will be halved until they fit; {'; '.join(changes)}")
        return "\n".join(map(wrapped, lines))


@dataclass(frozen=True)
class Setting:
    """What a run is asked for that decides what memory it takes.

    Attributes:
        dtype: of the base model.
        device: "cpu" or "cuda".
        free: bytes that there are before the model is loaded.
        recompute: what backward computes again; None for as little as lets the training fit.
        compiled: whether decoder layers are compiled; None for where that pays off.
        quantization: None, "4bit" or "8bit".
        attention: transformers' name of an implementation; None for packed attention.
    """

    dtype: str
    device: str
    free: int
    recompute: What | None = None
    compiled: bool | None = None
    quantization: str | None = None
    attention: str | None = None

    def compiles(self, parameters: int) -> bool:
        """Return whether decoder layers are compiled over a base of so many parameters."""
        return self.device == "cuda" and parameters >= COMPILED_FROM if self.compiled is None else self.compiled

    def forecast(
        self, model: MultiAdapterModel, orders: Sequence[Order], simultaneously: int | None, notes: list[str]
    ) -> Forecast | None:
        """Return the memory of a training; None, with a note, where it cannot be told.

        Args:
            model: on the meta device, with all adapters; not to be used afterwards.
            orders: of all jobs.
            simultaneously: adapters in one forward; None for all.
            notes: what is unknown, and why.

        Raises:
            ModelError: the family has no part that is to be computed again.
        """
        if self.recompute is not None:
            model.recompute = Recompute(self.recompute)
        try:
            rehearsal = Rehearsal(model, self.device, self.compiles(model.num_parameters(None)), self.quantization)
            return forecast(rehearsal, orders, simultaneously, self.recompute, self.free)
        except Exception as error:  # whatever a family does that needs values, a training does not depend on it
            log.debug("no forecast of the memory", exc_info=error)
            notes.append(f"memory: {str(error).partition(chr(10))[0] or type(error).__name__}")
            return None


def forecast(
    rehearsal: Rehearsal, orders: Sequence[Order], simultaneously: int | None, recompute: What | None, free: int
) -> Forecast:
    """Rehearse the heaviest forward of a training.

    Args:
        rehearsal: of the model with all adapters.
        orders: of all jobs.
        simultaneously: adapters in one forward; None for all.
        recompute: what backward computes again; None for as little as lets the training fit.
        free: bytes that there are before the model is loaded.

    Raises:
        ModelError: the family has no part of that name.
    """
    model = rehearsal.model
    rows = heaviest(orders, simultaneously)
    kept = sum(optimizer_bytes(o.config, model.num_parameters(o.config.name)) for o in orders)
    accumulates = any(o.config.micro_batch_size < min(o.config.batch_size, len(o.samples)) for o in orders)

    ahead = islice(forwards(orders, simultaneously), LOOKED_AT) if rehearsal.device == "cuda" else ()
    sizes = sizes_of(ahead, model.num_parameters(None))

    @cache
    def take(chosen: Recompute) -> Footprint:
        return rehearsal.step(rows, chosen, kept, accumulates, sizes)

    chosen = _least(take, model.sites, USABLE * free) if recompute is None else Recompute(recompute)
    found = Forecast(take(chosen), chosen, rehearsal.device, free)
    if found.fits:
        return found
    instead = {}
    if chosen != Recompute("all"):
        instead["--recompute all"] = take(Recompute("all")).total
    if any(len(own) > 1 for own in rows.values()):
        half = {name: own[: math.ceil(len(own) / 2)] for name, own in rows.items()}
        instead["half the micro_batch_size"] = rehearsal.step(half, chosen, kept, accumulates=True).total
    return Forecast(found.footprint, chosen, rehearsal.device, free, instead)


def _least(take: Any, sites: Any, limit: float) -> Recompute:
    """Return what costs least time of all that fits; everything where nothing does.

    What one layer saves says about how many it takes; time goes with the sizes of the frozen products that are computed
    again.
    """
    nothing = take(Recompute())
    if nothing.total <= limit:
        return Recompute()
    layers, found = len(sites.layers), list[tuple[int, Recompute]]()
    whats: tuple[What, ...] = ("middle", "all") if sites.blocks else ("all",)
    for what in whats:
        saved = nothing.total - take(Recompute(what, 1)).total
        if saved <= 0 or take(Recompute(what)).total > limit:
            continue
        count = math.ceil((nothing.total - limit) / saved)
        while count < layers and take(Recompute(what, count)).total > limit:
            count += 1
        while count > 1 and take(Recompute(what, count - 1)).total <= limit:
            count -= 1
        products = [s for s in sites.linears.values() if s.in_block or what == "all"]
        cost = min(count, layers) * sum(s.in_features * s.out_features for s in products)
        found.append((cost, Recompute(what, count if count < layers else None)))
    return min(found, key=lambda option: option[0])[1] if found else Recompute("all")


def _size(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
