"""Held-out loss: measured while an adapter trains, to keep its best state rather than its last."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from mlora.data import Sample
from mlora.model.batch import Batch, Row
from mlora.model.memory import in_batches
from mlora.model.multi import MultiAdapterModel
from mlora.parallel import ALONE, Ranks


@dataclass
class HeldOut:
    """Rows that an adapter is not trained on.

    Attributes:
        adapter: its name.
        samples: the rows.
        batch_size: rows of a forward pass.
    """

    adapter: str
    samples: Sequence[Sample]
    batch_size: int

    @torch.no_grad()
    def loss(self, model: MultiAdapterModel, ranks: Ranks = ALONE) -> float:
        """Return the mean cross-entropy over all label tokens, or rows in classification, without dropout.

        Args:
            model: that holds the adapter.
            ranks: that share the rows.
        """
        model.eval()

        def outputs(samples: Sequence[Sample]) -> tuple[float, int]:
            rows = [Row(s.input_ids, s.labels, self.adapter, class_id=s.class_id) for s in samples]
            out = model(Batch.pack(rows, device=model.device))[self.adapter]
            return float(out.loss) * int(out.num_tokens), int(out.num_tokens)

        parts = ranks.all_done(lambda: list(in_batches(ranks.share(self.samples), self.batch_size, outputs)))
        sums, tokens = zip(*chain(*parts), strict=True)
        return sum(sums) / max(sum(tokens), 1)


def split(samples: Sequence[Sample], held_out: int, seed: int, adapter: str) -> tuple[list[Sample], list[Sample]]:
    """Return (training rows, held-out rows), the latter drawn by seed and adapter; both in the order of the data.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if held_out >= len(samples):
        raise ValueError(f"{held_out} of {len(samples)} rows cannot be held out: none is left to train on")
    chosen = set(random.Random(f"{seed}\n{adapter}").sample(range(len(samples)), held_out))
    return (
        [sample for i, sample in enumerate(samples) if i not in chosen],
        [sample for i, sample in enumerate(samples) if i in chosen],
    )
