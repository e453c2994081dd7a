"""How a family computes sequences side by side: tried out on a few tokens when a model is loaded, not looked up.

The packed attention is tried first, then transformers' own block masks, then padded rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlora.model.attention import PACKED
from mlora.model.batch import Batch, Row
from mlora.model.errors import ModelError

if TYPE_CHECKING:
    from mlora.model.multi import MultiAdapterModel

log = logging.getLogger(__name__)


@torch.no_grad()
def choose_attention(model: MultiAdapterModel) -> None:
    """Take the first way in which sequences of a batch do not see each other.

    Linear layers that the family never calls are left out from then on. Also find out whether the family's logits are
    its output layer's and nothing more (some cap or scale them), so that losses need not hold them all.

    Raises:
        ModelError: the family mixes sequences all the same, or its tokens see those that follow.
    """
    family, config = type(model.hf_model).__name__, model.hf_model.config
    wanted = config._attn_implementation
    candidates = (PACKED, "sdpa", "eager") if wanted == PACKED else (wanted,)
    if wanted == PACKED and not _takes(model, "eager"):  # its attention is its own, and so must its masks be
        config._attn_implementation = "eager"
        candidates = ("eager",)
    why = "the logits of sequences side by side differ from those of each alone"
    for model.padded in (False, True):
        for attention in candidates:
            try:
                model.hf_model.set_attn_implementation(attention)
                with model.sites.only_called():
                    fits = keeps_apart(model)
            except (torch.OutOfMemoryError, ModelError):
                raise
            except Exception as error:  # whatever a family raises, the answer is to try the next
                why = str(error).partition("\n")[0] or type(error).__name__
                continue
            if fits:
                if model.padded or attention != wanted:
                    how = "padded rows" if model.padded else "block masks"
                    log.warning("%s: packed attention does not fit; using %s (%s attention)", family, how, attention)
                model.outputs_plainly = _outputs_plainly(model)
                return
    raise ModelError(f"{family} cannot train several sequences at once: {why}")


def keeps_apart(model: MultiAdapterModel) -> bool:
    """Compare sequences computed together with each of them alone, as an ordinary forward of transformers does.

    Raises:
        ModelError: tokens see those that follow them.
    """
    vocabulary = model.hf_model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(min(5, vocabulary - 1), vocabulary, (n,), generator=draw).tolist() for n in (11, 7)]
    ids.append(ids[0][:5])
    batch = Batch.pack([Row(row, row) for row in ids], device=model.device)
    together = model.packed_logits(batch).float()
    kept = model.hf_model.config._attn_implementation
    with _attention(model, "eager" if kept == PACKED else kept):
        alone = [_alone(model, row) for row in ids]
    exact = model.hf_model.dtype == torch.float32 and not getattr(model.hf_model, "is_quantized", False)
    expected = torch.cat(alone).float()
    tolerance = (1e-4 if exact else 6e-2) * float(expected.abs().max())

    def alike(found: Tensor, wanted: Tensor) -> bool:
        apart = float((found - wanted).abs().max())
        return apart <= tolerance or (not exact and apart <= 3 * _rounding(model, ids[0], alone[0]))

    if not alike(alone[2], alone[0][:5]):
        family = type(model.hf_model).__name__
        raise ModelError(f"{family} is no causal language model: its tokens see those that follow them")
    return alike(together, expected)


def _rounding(model: MultiAdapterModel, ids: list[int], eager: Tensor) -> float:
    """Return by how much a sequence's logits differ from those that eager attention gives it.

    The arithmetic is the same and only rounded elsewhere, which deep and wide models in bf16 make much of.
    """
    with _attention(model, "sdpa"):
        return float((_alone(model, ids) - eager).abs().max())


def _alone(model: MultiAdapterModel, ids: list[int]) -> Tensor:
    """Return the logits [L, V] of one sequence from an ordinary forward."""
    return model.hf_model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]


@contextmanager
def _attention(model: MultiAdapterModel, attention: str) -> Iterator[None]:
    """Use an attention inside the `with` block."""
    kept = model.hf_model.config._attn_implementation
    try:
        model.hf_model.set_attn_implementation(attention)
        yield
    finally:
        model.hf_model.set_attn_implementation(kept)


def _takes(model: MultiAdapterModel, attention: str) -> bool:
    """Return whether the family takes the attention that it is given."""
    model.hf_model.set_attn_implementation(attention)
    return bool(model.hf_model.config._attn_implementation == attention)


def _outputs_plainly(model: MultiAdapterModel) -> bool:
    """Compare the output layer's own product with the logits of the model."""
    batch = Batch.pack([Row([0, 1, 2], [0, 1, 2])], device=model.device)
    logits, hidden, layer = model.packed_logits(batch), model.packed_hidden_states(batch), model.output_layer
    return isinstance(layer, nn.Linear) and torch.equal(layer(hidden), logits)
