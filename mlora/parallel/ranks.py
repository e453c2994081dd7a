"""What ranks say to each other: sums of tensors, and agreements on what to do next.

A rank is one process, with one GPU or on the CPU. Whoever starts ranks, `launch.py run --num_gpus`, torchrun or
`accelerate launch`, says in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT which of how many each is. All
ranks walk through the same program; where one of them could take another way than the others (memory that does not
suffice, a signal, the clock), it asks them first.

Small things go through gloo on the CPU, so that a rank which is gone is noticed even while the GPUs work; tensors go
through the backend of their device.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for others: longer than a base model takes to load. One that has ended is noticed at once."""

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


class Lost(Exception):
    """A rank that the others wait for has ended, or does not answer."""


def ranks_started(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks this process was started as one of, by its environment."""
    said = environment.get("WORLD_SIZE", "1")
    return int(said) if said.isdigit() and "RANK" in environment else 1


def places(sizes: Sequence[Sequence[int]], count: int) -> list[list[list[int]]]:
    """Spread items over ranks: about as much to each, and of each group no more than its even share.

    Args:
        sizes: of the items of each group, in tokens say.
        count: of ranks.

    Returns:
        For each rank and group, the indices of its items, in order.
    """
    chosen: list[list[list[int]]] = [[[] for _ in sizes] for _ in range(count)]
    loads = [0] * count
    for group, own in enumerate(sizes):
        most = -(-len(own) // count)
        for item in sorted(range(len(own)), key=lambda i: -own[i]):
            rank = min((r for r in range(count) if len(chosen[r][group]) < most), key=lambda r: (loads[r], r))
            chosen[rank][group].append(item)
            loads[rank] += own[item]
    return [[sorted(group) for group in groups] for groups in chosen]


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is, and what it has in common with the others. Alone, everything returns at once.

    Attributes:
        rank: from 0.
        count: of all ranks.
        local: number among the ranks of this machine, and of its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """Return what the environment says; a process that nobody started as a rank is alone."""
        count = ranks_started()
        if count == 1:
            return ALONE
        rank = int(os.environ["RANK"])
        return cls(rank, count, int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Be in touch with the other ranks within the block.

        Args:
            device: "cuda" or "cpu".

        Raises:
            Lost: they are not there.
        """
        if self.count == 1:
            yield
            return
        import torch
        import torch.distributed as dist

        cuda = device == "cuda"
        if cuda:
            torch.cuda.set_device(self.local)
        with _noticed():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        try:
            yield
            self.agree()
        finally:
            dist.destroy_process_group()

    # -- data ------------------------------------------------------------------------------------------------------

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this rank's part of items: every count-th."""
        return items[self.rank :: self.count]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Put the sum over all ranks in a tensor's place, in the same bits on each, and return it."""
        if self.count > 1:
            import torch.distributed as dist

            with _noticed():
                dist.all_reduce(tensor)
        return tensor

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Return the sum over all ranks of each number."""
        if self.count == 1:
            return list(numbers)
        import torch

        return list(self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist())

    def from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have on the first rank."""
        if self.count > 1:
            import torch.distributed as dist

            for tensor in tensors:
                whole = tensor.detach().contiguous()
                with _noticed():
                    dist.broadcast(whole, 0)
                tensor.detach().copy_(whole)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, in order; they are pickled on the way."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with _noticed():
            dist.all_gather_object(found, value)
        return found

    # -- agreements ------------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.sums([flag])[0] > 0

    def agree(self) -> None:
        """Wait until all ranks are here."""
        self.sums([0])

    def all_done(self, compute: Callable[[], _Value]) -> list[_Value]:
        """Return what `compute` has returned on every rank; what it has raised on one is raised on all.

        `compute` must not ask other ranks anything.
        """
        if self.count == 1:
            return [compute()]
        try:
            value = compute()
        except Exception as error:  # the others wait: they are told, whatever it is
            self.gather(_Raised(_told(error)))
            raise
        answers = self.gather(value)
        for answer in answers:
            if isinstance(answer, _Raised):
                raise answer.error
        return answers

    def in_turn(self, compute: Callable[[], _Value]) -> _Value:
        """Return what `compute` returns, run on one rank after the other, the first at first."""
        found: list[_Value] = []

        def own() -> None:
            found.append(compute())

        for turn in range(self.count):
            self.all_done(own if turn == self.rank else _nothing)
        return found[0]

    def as_first(self, compute: Callable[[], _Value]) -> _Value:
        """Return what `compute` returns on the first rank, the only one that runs it."""
        return self.all_done(lambda: compute() if self.first else None)[0]  # type: ignore[return-value]


@dataclass(frozen=True)
class _Raised:
    """Sent in place of a value that there is not."""

    error: Exception


def _nothing() -> None:
    """What the ranks do whose turn it is not."""


ALONE = Ranks()
"""Of a process that has no others beside it."""


def _told(error: Exception) -> Exception:
    """Return an exception as it can be sent to other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever it holds
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _noticed() -> Iterator[None]:
    """Turn what torch raises about ranks that are gone into Lost."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise Lost(f"another process of this run has ended or does not answer ({why})") from error
