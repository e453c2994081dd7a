"""Sequences with a common beginning, packed so that it is computed once.

A tree is a prompt and its branches. A branch's tokens see the prompt and their own branch up to themselves, and their
positions go on from the prompt's, so a branch computes what it would as the only one.

Shapes: T packed tokens, L tokens of one tree, N targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mlora.model.batch import IGNORED, Batch, Row

CELLS = {"cuda": 1 << 26}
"""Entries, one byte each, of the masks of a call on a device where a call for each tree would wait for Python."""
_BEYOND = 1 << 40
"""Position of padding: behind everything."""


@dataclass(frozen=True)
class Tree:
    """A prompt and what may follow it.

    Attributes:
        prompt: tokens; may be empty.
        branches: tokens of each continuation.
        unscored: leading tokens of each that are read and not scored; at least one where there is no prompt.
        adapter: name; None for the plain base model.
    """

    prompt: Sequence[int]
    branches: Sequence[Sequence[int]]
    unscored: Sequence[int]
    adapter: str | None = None

    def apart(self) -> list[Tree]:
        """Return a tree for each branch, so that nothing is shared."""
        return [
            Tree(self.prompt, (branch,), (unscored,), self.adapter)
            for branch, unscored in zip(self.branches, self.unscored, strict=True)
        ]


class Block(NamedTuple):
    """Trees that are attended in one call, padded on the right to the longest of them.

    Attributes:
        places: [b, L] of their tokens in the packed stream; padding repeats the first.
        mask: [b, 1, L, L], True where a token (row) sees another; padding is seen by padding alone.
    """

    places: Tensor
    mask: Tensor


class Branches:
    """The lengths [prompt, branch, branch, ...] of each packed tree, and who sees whom in it.

    Args:
        parts: those lengths.
        device: of all tensors.
        cells: entries of a mask that padding may fill up, so that many trees take one call, the sooner the more alike
            their lengths are; 0 for a call for each tree, which computes least.

    Attributes:
        order: [T] where each packed token stands in the tokens of all blocks, one after the other.
    """

    def __init__(self, parts: Sequence[tuple[int, ...]], device: torch.device | str, cells: int = 0) -> None:
        lengths = [sum(own) for own in parts]
        starts = [0, *accumulate(lengths)]
        self._layouts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._blocks: dict[int | None, list[Block]] = {}
        order, offset = [0] * starts[-1], 0
        for trees in _alike(lengths, cells):
            longest = max(lengths[i] for i in trees)
            places, positions, numbers = list[list[int]](), list[list[int]](), list[list[int]]()
            for i in trees:
                start, missing = starts[i], longest - lengths[i]
                order[start : starts[i + 1]] = range(offset, offset + lengths[i])
                offset += longest
                places.append([*range(start, starts[i + 1]), *[start] * missing])
                positions.append([*_positions(parts[i]), *[_BEYOND] * missing])
                numbers.append([*(n for n, length in enumerate(parts[i]) for _ in range(length)), *[-1] * missing])
            layout = [torch.tensor(each, device=device) for each in (places, positions, numbers)]
            self._layouts.append((layout[0], layout[1], layout[2]))
        self.order = torch.tensor(order, device=device)

    def blocks(self, window: int | None) -> list[Block]:
        """Return the blocks, their masks made once for each window of tokens that a token sees."""
        if window not in self._blocks:
            self._blocks[window] = [Block(at, _mask(positions, part, window)) for at, positions, part in self._layouts]
        return self._blocks[window]


@dataclass(frozen=True)
class Targets:
    """What is scored of packed trees, in the order in which these were given, branch by branch.

    Attributes:
        positions: [N] the packed token before each target.
        tokens: [N] the targets.
        counts: how many of them each branch has.
    """

    positions: Tensor
    tokens: Tensor
    counts: tuple[int, ...]


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu") -> tuple[Batch, Targets]:
    """Pack trees into one stream; the last token of a branch predicts nothing and is left out."""
    inputs = [[branch[:-1] for branch in tree.branches] for tree in trees]
    rows = [
        [*tree.prompt, *(token for branch in branches for token in branch)]
        for tree, branches in zip(trees, inputs, strict=True)
    ]
    batch = Batch.pack(
        [Row(ids, [IGNORED] * len(ids), tree.adapter) for ids, tree in zip(rows, trees, strict=True)], device=device
    )
    starts, start = {}, 0
    for i in batch.order:
        starts[i] = start
        start += len(rows[i])
    positions, tokens, counts = list[int](), list[int](), list[int]()
    for i, (tree, branches) in enumerate(zip(trees, inputs, strict=True)):
        begin, last = starts[i] + len(tree.prompt), starts[i] + len(tree.prompt) - 1
        for branch, read, unscored in zip(tree.branches, branches, tree.unscored, strict=True):
            before = [last, *range(begin, begin + len(read))]
            positions += before[unscored:]
            tokens += branch[unscored:]
            counts.append(len(branch) - unscored)
            begin += len(read)
    targets = Targets(torch.tensor(positions, device=device), torch.tensor(tokens, device=device), tuple(counts))
    parts = [(len(trees[i].prompt), *map(len, inputs[i])) for i in batch.order]
    if all(sum(map(bool, lengths[1:])) < 2 for lengths in parts):  # ordinary sequences
        return batch, targets
    at = [p for lengths in parts for p in _positions(lengths)]
    position_ids = torch.tensor(at, device=device)
    branching = Branches(parts, device, CELLS.get(torch.device(device).type, 0))
    return replace(batch, position_ids=position_ids[None], branches=branching), targets


def _alike(lengths: Sequence[int], cells: int) -> Iterator[list[int]]:
    """Yield trees by length, as many together as their padded masks have at most so many entries."""
    together: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if together and (len(together) + 1) * lengths[i] ** 2 > cells:
            yield together
            together = []
        together.append(i)
    yield together


def _positions(lengths: tuple[int, ...]) -> list[int]:
    prompt, *branches = lengths
    return [*range(prompt), *(p for length in branches for p in range(prompt, prompt + length))]


def _mask(positions: Tensor, part: Tensor, window: int | None) -> Tensor:
    """Return [b, 1, L, L] from each token's position and the number of its part [b, L]: 0 the prompt, -1 padding."""
    distance = positions[:, :, None] - positions[:, None]
    visible = (distance >= 0) & ((part[:, None] == 0) | (part[:, :, None] == part[:, None]))
    return (visible if window is None else visible & (distance < window))[:, None]
