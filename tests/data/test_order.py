"""The order of an epoch."""

from __future__ import annotations

from mlora.data import epoch_order


def test_the_order_is_the_same_everywhere() -> None:
    # Recorded; a change would make resumed and repeated runs differ.
    assert epoch_order(8, 42, "a", 0) == ORDER
    assert epoch_order(8, 42, "a", 0) == epoch_order(8, 42, "a", 0)


def test_seed_adapter_and_epoch_each_change_it() -> None:
    orders = [epoch_order(50, *key) for key in [(42, "a", 0), (43, "a", 0), (42, "b", 0), (42, "a", 1)]]
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_no_rows() -> None:
    assert epoch_order(0, 1, "a", 0) == []
    assert epoch_order(0, 1, "a", 0, lengths=[], batch_size=4) == []


def test_rows_of_like_length_share_a_batch() -> None:
    n, size = 1003, 4
    lengths = [(i * 37) % 100 for i in range(n)]
    order = epoch_order(n, 42, "a", 0, lengths=lengths, batch_size=size)
    assert sorted(order) == list(range(n))
    batches = [[lengths[i] for i in order[start : start + size]] for start in range(0, n, size)]
    assert len(batches[-1]) == 3
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread < 5
    firsts = [batch[0] for batch in batches]
    assert firsts[:50] != sorted(firsts[:50])


ORDER = [1, 7, 4, 5, 6, 3, 0, 2]
