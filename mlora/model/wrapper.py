"""What stands around a part of the frozen model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mlora.model.adapter import Adapter, Site
from mlora.model.scope import Scope


class Wrapper(nn.Module):
    """A part of the frozen model and the adapters injected at it.

    Attributes:
        frozen: the part.
        site: where it is.
        scope: which tokens are whose.
        adapters: all of the model's, by name.
    """

    def __init__(self, frozen: nn.Module, site: Site, scope: Scope, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.frozen, self.site, self.scope, self.adapters = frozen, site, scope, adapters

    @property
    def weight(self) -> Tensor:
        """The frozen weight: families read its dtype, and transformers ties the output layer's to the embeddings'."""
        return self.frozen.weight  # type: ignore[return-value]

    def _holds(self, name: str | None) -> bool:
        """Return whether an adapter has tensors of its own here."""
        return name is not None and self.site.path in self.adapters[name].tensors
