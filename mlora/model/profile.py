"""Router profiles: how each routed layer of an adapter spreads tokens over its experts.

`router.jsonl` of a run folder has one line for each adapter and moment, and in an evaluation for each task:

    {"adapter": "mixlora_0", "step": 200, "split": "train", "task": "arc-e", "protocol": "letter", "tokens": 4096,
     "layers": [{"layer": 0, "path": "model.layers.0.mlp", "share": [0.12, ...], "probability": [0.13, ...],
                 "balance": 0.97, "entropy": 0.41, "dead": [5]}, ...]}

- step: optimizer steps that the adapter had taken; null for one that is only evaluated.
- split: "train" where the tokens are those of a training step, else the split that was evaluated.
- task: of the tokens; in training on a mixture its tasks joined by ";".
- tokens: that each router saw.
- layer, path: where the router sits; MixLoRA has one for each feed-forward block, MoLA one for each linear layer.
- share: n_e / sum n_e over tokens that chose expert e, at whichever rank; sums to 1. LoRAMoE, where all experts
  compute every token, counts the most probable one.
- probability: mean probability of each expert.
- balance: entropy of `share` over log E; 1 where all experts are used alike, 0 where one takes everything.
- entropy: mean over tokens of the entropy of the router's probabilities over log E; 0 where it is always certain.
- dead: experts that no token chose.

Shapes: R routers of an adapter, n tokens, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlora.adapters import Method
from mlora.adapters.routed import Routed


class RouterProfile:
    """Adds up what the routers of one adapter do; nothing leaves the device before `layers` is called.

    Args:
        method: of the adapter.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.tokens = 0
        self._paths: tuple[str, ...] = ()
        self._sums: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def add(self, router_logits: Mapping[str, Tensor]) -> None:
        """Take in the logits [n, E] of every router, by site path; none where the adapter has no routers."""
        if not router_logits or not isinstance(self.method, Routed):
            return
        logits = torch.stack([own.detach() for own in router_logits.values()])  # [R, n, E]
        probabilities = logits.softmax(-1)
        sums = (
            self.method.chosen(logits.flatten(0, 1)).view_as(logits).sum(1),
            probabilities.sum(1),
            torch.special.entr(probabilities).sum((1, 2)),
        )
        self._sums = tuple(map(torch.add, self._sums, sums)) if self._sums else sums
        self._paths = tuple(router_logits)
        self.tokens += logits.shape[1]

    def on_cpu(self) -> RouterProfile:
        """Return the same, to be sent to another process."""
        found = RouterProfile(self.method)
        found.tokens, found._paths, found._sums = self.tokens, self._paths, tuple(part.cpu() for part in self._sums)
        return found

    def merge(self, other: RouterProfile) -> None:
        """Take in what the same adapter's routers did elsewhere."""
        if other._sums:
            sums = tuple(
                theirs.to(own.device) for own, theirs in zip(self._sums or other._sums, other._sums, strict=True)
            )
            self._sums = tuple(map(torch.add, self._sums, sums)) if self._sums else sums
            self._paths = other._paths
            self.tokens += other.tokens

    def layers(self) -> list[dict[str, Any]]:
        """Return what `router.jsonl` holds of every router, in the order in which they ran; [] where there is none."""
        if not self._sums or not self.tokens:
            return []
        chosen, probability, entropy = (total.double().cpu() for total in self._sums)
        share = chosen / chosen.sum(-1, keepdim=True)
        certain = math.log(share.shape[-1]) or 1.0  # one expert alone: every entropy is 0
        columns = zip(self._paths, share.tolist(), (probability / self.tokens).tolist(), entropy.tolist(), strict=True)
        return [
            {
                "layer": _layer(path),
                "path": path,
                "share": _rounded(own),
                "probability": _rounded(mean),
                "balance": round(sum(-p * math.log(p) for p in own if p) / certain, 5) + 0.0,
                "entropy": round(total / self.tokens / certain, 5),
                "dead": [expert for expert, p in enumerate(own) if p == 0],
            }
            for path, own, mean, total in columns
        ]


def _layer(path: str) -> int:
    """Return the index of the decoder layer that a site lies in: the first number of its path."""
    found = re.search(r"\.(\d+)(\.|$)", path)
    return int(found[1]) if found else 0


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]
