"""To which sizes batches are brought: few, since each is recorded as a graph, and near, since filling is computed, too.

Shapes: S adapters, n tokens, m sequences and t targets of each.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from mlora.model.batch import IGNORED, Row

RECORDING = 5 * 10**13
"""What one more size costs, in tokens times parameters of the base model: recording it takes some 3 seconds of Python,
in which a GPU computes so much of a small model."""


SHORTEST = 64
"""Tokens of the longest sequence that are not told from fewer."""


class Size(NamedTuple):
    """What every adapter of a batch has.

    Attributes:
        tokens, sequences, targets: n, m and t.
        longest: tokens of the longest sequence that it may have.
    """

    tokens: int
    sequences: int
    targets: int
    longest: int

    def holds(self, other: Size) -> bool:
        """Return whether a batch of the other size can be filled up to this one."""
        more = self.tokens - other.tokens
        enough = more >= 0 and self.targets >= other.targets and self.longest >= other.longest
        return enough and self.sequences >= other.sequences + -(-more // self.longest)


Sizes = Mapping[frozenset[str], Sequence[Size]]
"""Sizes from the smallest on, by the adapters of a batch."""


def size_of(tokens: int) -> int:
    """Return the next size from tokens on: eight steps to each power of two, so at most an eighth is filled up."""
    step = max(8, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def size_for(rows: Mapping[str, Sequence[Row]]) -> Size:
    """Return a size that all adapters' rows fit into."""
    tokens = max(sum(len(row.input_ids) for row in own) for own in rows.values())
    targets = max(sum(label != IGNORED for row in own for label in row.labels[1:]) for own in rows.values())
    tokens = size_of(tokens)
    # few numbers of targets and lengths, since sizes multiply; what targets fill up costs only the output layer
    longest = max(SHORTEST, _power(max(len(row.input_ids) for own in rows.values() for row in own)))
    sequences = max(
        len(own) + max(1, -(-(tokens - sum(len(row.input_ids) for row in own)) // longest)) for own in rows.values()
    )
    return Size(tokens, sequences, _power(targets), longest)


def _power(n: int) -> int:
    """Return the next power of two from n on; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def sizes_of(forwards: Iterable[Mapping[str, Sequence[Row]]], parameters: int) -> Sizes:
    """Return the sizes that make a training shortest: what is filled up in all of it against what recording costs.

    Nothing decides but the training's rows, so a training that is resumed has the sizes of one that is not.

    Args:
        forwards: rows of each adapter, of every forward of the training.
        parameters: of the base model.
    """
    needed: dict[frozenset[str], Counter[Size]] = defaultdict(Counter)
    for rows in forwards:
        needed[frozenset(rows)][size_for(rows)] += 1
    return {names: _chosen(counts, len(names) * parameters) for names, counts in needed.items()}


def _chosen(needed: Counter[Size], price: int) -> list[Size]:
    """Return sizes that hold all those needed, at the least cost of a token of each at this price."""
    times: Counter[int] = Counter()
    for size, count in needed.items():
        times[size.tokens] += count
    tokens = sorted(times)
    before = [0, *accumulate(times[n] for n in tokens)]  # forwards of fewer tokens, and their tokens
    own = [0, *accumulate(times[n] * n for n in tokens)]
    best = [(0, 0)]  # of the first i sizes: the cost, and where the largest group of them begins
    for end in range(1, len(tokens) + 1):
        filled = (tokens[end - 1] * (before[end] - before[i]) - (own[end] - own[i]) for i in range(end))
        best.append(min((best[i][0] + RECORDING + price * more, i) for i, more in enumerate(filled)))
    groups, end = list[Size](), len(tokens)
    while end:
        start = best[end][1]
        inside = [size for size in needed if tokens[start] <= size.tokens <= tokens[end - 1]]
        most = Size(*map(max, zip(*inside, strict=True)))
        sequences = max(size.sequences + -(-(most.tokens - size.tokens) // most.longest) for size in inside)
        groups.append(most._replace(sequences=sequences))
        end = start
    return groups[::-1]
