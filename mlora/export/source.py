"""What is exported: a saved adapter and the base model that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mlora.adapters import Method
from mlora.model import card, files, load
from mlora.model.multi import MultiAdapterModel

if TYPE_CHECKING:
    from torch import Tensor


NAME = "adapter"
"""What the adapter is called in the models below."""
PROBE = (2, 12)
"""Rows and tokens on which a written model is compared with the one that it was written from."""


@dataclass(frozen=True, eq=False)
class Source:
    """A saved adapter, read, and where its base model lies.

    Attributes:
        origin: of the base model.
        folder: of the adapter.
        method: its typed config.
        tensors: named as in its file.
    """

    origin: load.Origin
    folder: Path
    method: Method
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, base_model: str, adapter: Path, revision: str | None, trust_remote_code: bool) -> Source:
        """Read the adapter, tensors only where it is a pickle, and find the base model.

        Raises:
            ModelError: either is not there or cannot be read.
        """
        method, tensors, _ = files.read(adapter, allow_pickle=True)
        return cls(load.find(base_model, revision, trust_remote_code), adapter, method, tensors)

    def shapes(self) -> MultiAdapterModel:
        """Return the base model without weights, the adapter in it.

        Raises:
            ModelError: the adapter does not fit the base model.
        """
        with torch.device("meta"):
            model = MultiAdapterModel(load.load_shapes(self.origin), self.origin)
        model.load_adapter(self.folder, NAME, allow_pickle=True)
        return model

    def weights(self, dtype: torch.dtype) -> MultiAdapterModel:
        """Return the base model with the adapter in it.

        Raises:
            ModelError: the base model cannot be loaded, or the adapter does not fit it.
        """
        place = self.origin
        model = MultiAdapterModel.from_pretrained(
            place.given, dtype, revision=place.revision, trust_remote_code=place.trust_remote_code
        )
        model.load_adapter(self.folder, NAME, allow_pickle=True)
        return model

    def making(self) -> card.Making:
        """Return what the adapter's card says of its training that holds for what is written from it."""
        datasets = card.read(self.folder)[0].get("datasets")
        return card.Making(tuple(map(str, datasets)) if isinstance(datasets, list) else ())


def probe_ids(vocabulary: int) -> Tensor:
    """Return the random tokens of `PROBE`."""
    return torch.randint(vocabulary, PROBE, generator=torch.Generator().manual_seed(0))


def probe(model: MultiAdapterModel, adapter: str | None = NAME) -> Tensor:
    """Return the logits of the adapter, or of the plain base model (None), on the random tokens."""
    ids = probe_ids(model.hf_model.get_input_embeddings().weight.shape[0])
    return model.logits(ids, torch.ones_like(ids), [adapter] * len(ids))
