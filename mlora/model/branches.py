"""Sequences with a common beginning, packed so that it is computed once.

A tree is a prompt and its branches. A branch's tokens see the prompt and their own branch up to themselves, and their
positions go on from the prompt's, so a branch computes what it would as the only one.

Shapes: T packed tokens, L tokens of one tree, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlora.model.batch import IGNORED, Batch, Row


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


class Branches:
    """The lengths [prompt, branch, branch, ...] of each packed tree, and who sees whom in it."""

    def __init__(self, parts: Sequence[tuple[int, ...]], positions: Tensor) -> None:
        self.parts, self.positions = parts, positions
        self._masks: dict[int | None, list[Tensor]] = {}

    def masks(self, window: int | None) -> list[Tensor]:
        """Return the mask [L, L] of each tree, made once for each window of tokens that a token sees."""
        if window not in self._masks:
            positions = self.positions.split([sum(lengths) for lengths in self.parts])
            self._masks[window] = [_mask(*tree, window) for tree in zip(self.parts, positions, strict=True)]
        return self._masks[window]


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
    return replace(batch, position_ids=position_ids[None], branches=Branches(parts, position_ids)), targets


def _positions(lengths: tuple[int, ...]) -> list[int]:
    prompt, *branches = lengths
    return [*range(prompt), *(p for length in branches for p in range(prompt, prompt + length))]


def _mask(lengths: tuple[int, ...], positions: Tensor, window: int | None) -> Tensor:
    part = torch.repeat_interleave(torch.tensor(lengths, device=positions.device))
    distance = positions[:, None] - positions
    visible = (distance >= 0) & ((part == 0) | (part[:, None] == part))
    return visible if window is None else visible & (distance < window)
