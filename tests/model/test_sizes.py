"""Sizes of batches: every forward fits, few are recorded where little is won, and none could be chosen better."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest

from mlora.model import sizes
from mlora.model.batch import IGNORED, Row
from mlora.model.sizes import Size, size_for, sizes_of


def forward(*lengths: int, name: str = "x") -> dict[str, list[Row]]:
    return {name: [Row([5] * n, [IGNORED, *[5] * (n - 1)], name, i) for i, n in enumerate(lengths)]}


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 1000, 1025, 4097])
def test_sizes_are_few_and_near(tokens: int) -> None:
    assert tokens <= sizes.size_of(tokens) <= max(tokens * 1.125 + 8, 8)
    assert len({sizes.size_of(n) for n in range(1, 4097)}) < 60


def test_every_forward_fits_and_the_last_of_an_epoch_too() -> None:
    draw = random.Random(0)
    ahead = [forward(*(draw.randrange(4, 60) for _ in range(16))) for _ in range(40)] + [forward(9, 30)]
    (found,) = sizes_of(ahead, 10**9).values()
    assert 1 <= len(found) < len({size_for(rows) for rows in ahead})
    for rows in ahead:
        assert any(size.holds(size_for(rows)) for size in found)
    for rows in ahead:  # what fills a batch up is not longer than its longest sequence may be
        for size in (size_for(rows), *(size for size in found if size.holds(size_for(rows)))):
            spare, left = size.sequences - len(rows["x"]), size.tokens - sum(len(row.input_ids) for row in rows["x"])
            assert left <= spare * size.longest and max(len(row.input_ids) for row in rows["x"]) <= size.longest


def test_more_are_worth_recording_in_a_long_training_and_for_a_large_model() -> None:
    draw = random.Random(1)
    epoch = [forward(*(draw.randrange(20, 100) for _ in range(16))) for _ in range(60)]
    few, more, most = (
        len(next(iter(sizes_of(ahead, parameters).values())))
        for ahead, parameters in ((epoch, 10**8), (epoch * 20, 10**9), (epoch * 20, 10**11))
    )
    assert 1 == few < more < most


def test_adapters_that_train_together_at_other_times_have_sizes_of_their_own() -> None:
    alone, both = forward(30, 40), forward(30) | forward(200, name="y")
    found = sizes_of([alone, alone, both], 10**8)
    assert found == {frozenset("x"): [size_for(alone)], frozenset("xy"): [size_for(both)]}


def test_no_choice_of_sizes_costs_less() -> None:
    draw = random.Random(2)
    for _ in range(20):
        needed = Counter({Size(8 * draw.randrange(1, 40), 3, 1, 64): draw.randrange(1, 30) for _ in range(6)})
        price = draw.randrange(10**8, 10**11)

        def cost(ends: tuple[int, ...], needed=needed, price=price) -> int:
            filled = sum(n * (min(e for e in ends if e >= size.tokens) - size.tokens) for size, n in needed.items())
            return sizes.RECORDING * len(ends) + price * filled

        tokens = sorted(size.tokens for size in needed)
        choices = [(*some, tokens[-1]) for n in range(len(tokens)) for some in combinations(tokens[:-1], n)]
        found = tuple(size.tokens for size in sizes._chosen(needed, price))
        assert cost(found) == min(map(cost, choices))
