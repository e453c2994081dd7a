"""`docs/pages/families.md` says of every family what is observed here, tiny and random.

`python -m tests.test_families` writes the table of the document again.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mlora.model.batch import Batch
from mlora.model.errors import ModelError
from mlora.model.multi import MultiAdapterModel
from tests.families import TABLE, awaken, multi, rows

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "pages" / "families.md"
COLUMNS = {
    "attention": {"r": 2, "target_modules": "attention"},
    "all-linear": {"r": 2},
    "experts": {"r": 2, "routing_strategy": "mixlora", "num_experts": 3, "top_k": 2, "router_init_range": 0.5},
}
HEAD = ("family", "sequences", *COLUMNS)
NO_GRADIENT = {"doge": "dt_proj"}
"""Layers that change nothing in sequences this short: they choose among more than 2,048 tokens."""


def observe(family: str) -> tuple[str, ...]:
    """Return a row of the table, having run everything that it says works."""
    try:
        model = multi(family)
    except ModelError as error:
        return (family, f"refused: {error}", *("-" for _ in COLUMNS))
    attention = model.hf_model.config._attn_implementation
    sequences = "padded rows" if model.padded else "packed" if attention == "packed" else "block masks"
    cells = []
    for name, config in COLUMNS.items():
        try:
            model.add_adapter(name, config)
            cells.append("yes")
        except ModelError as error:
            cells.append(cause(str(error)))
    run(model, NO_GRADIENT.get(family))
    return (family, sequences, *cells)


def cause(message: str) -> str:
    """Return what refuses: the part of a decoder layer without its number, and why."""
    message = re.sub(r"^\w+ cannot take (target_modules )?\S+: ", "", message)
    message = re.sub(r"\.( Its linear layers are .*)?$", "", message)
    return re.sub(r"^\S+\.\d+\.(\S+)", r"`\1`", message)


def run(model: MultiAdapterModel, no_gradient: str | None) -> None:
    """Hold every adapter to an effect, to a gradient of each layer, and to independence of its company."""
    names = list(model.adapters)
    ids, mask = rows(4)
    owners = [*names, *[None] * 4][:4]
    real = mask.bool()
    frozen = model.logits(ids, mask, [None] * 4)
    awaken(model)
    mixed = model.logits(ids, mask, owners)
    for i, owner in enumerate(owners):
        alone = model.logits(ids[i : i + 1], mask[i : i + 1], [owner])[0]
        assert (alone - mixed[i])[real[i]].abs().max() < 1e-5, f"{owner}: company changes logits"
        effect = (alone - frozen[i])[real[i]].abs().max()
        assert (effect > 1e-4) if owner else (effect < 1e-5), f"{owner}: effect {effect}"
    assert model.score(Batch.from_rows(ids, mask, None, owners), torch.tensor([2]), ids[:1, :2]).shape == (1, 2)
    if names:
        out = model(Batch.from_rows(ids, mask, None, owners))
        torch.stack([o.loss + o.aux_loss for o in out.values()]).sum().backward()
    for name in names:
        for path, tensors in model._adapters[name].tensors.items():
            if "lora_B" in tensors and path.rpartition(".")[2] != no_gradient:
                gradient = tensors["lora_B"].grad
                assert gradient is not None and gradient.abs().max() > 0, f"{name}: {path} is not trained"


def table() -> str:
    lines = [HEAD, tuple("---" for _ in HEAD), *(observe(family) for family in sorted(TABLE))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def documented() -> dict[str, tuple[str, ...]]:
    lines = re.findall(r"^\| (.+) \|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    cells = [tuple(line.split(" | ")) for line in lines]
    assert cells[0] == HEAD
    return {row[0]: row for row in cells[2:]}


@pytest.mark.parametrize("family", TABLE)
def test_the_document_says_what_is_observed(family: str) -> None:
    assert documented()[family] == observe(family)


def test_the_document_lists_these_families() -> None:
    assert list(documented()) == sorted(TABLE)


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(re.sub(r"(^\|.*\n)+", lambda _: table(), text, flags=re.MULTILINE), encoding="utf-8")
