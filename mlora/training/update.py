"""Optimizer steps of several jobs at once: one wait for the device, and for AdamW on a GPU four launches in all.

Jobs of small models have hundreds of small tensors each; an optimizer that goes through them job by job keeps the
device waiting for Python, and fills a small part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mlora import ops

REMEMBERED = 4
"""Sets of optimizers whose tables are kept."""


class Updates:
    """Steps of optimizers; remembers where tensors lie from one to the next."""

    def __init__(self) -> None:
        self._joint: dict[tuple[Optimizer, ...], _Joint] = {}
        self._suits: dict[Optimizer, bool] = {}

    def step(self, optimizers: Sequence[Optimizer], limits: Sequence[float | None]) -> list[float]:
        """Take the step of each optimizer whose gradient is finite, and return the norms of the gradients.

        Args:
            optimizers: each with its gradients.
            limits: that each gradient is scaled down to where its norm is larger; None for none.
        """
        bounds = [math.inf if limit is None else limit for limit in limits]
        norms = dict[int, Tensor]()
        for optimizer in optimizers:
            if optimizer not in self._suits:
                self._suits[optimizer] = _suits(optimizer)
        together = [i for i, optimizer in enumerate(optimizers) if self._suits[optimizer] and _gradients(optimizer)]
        if together:
            joint = self._joint_of(tuple(optimizers[i] for i in together))
            norms |= zip(together, joint.step([bounds[i] for i in together]), strict=True)
        apart = [i for i in range(len(optimizers)) if i not in norms]
        norms |= {i: nn.utils.get_total_norm(_gradients(optimizers[i])) for i in apart}
        found = _read([norms[i] for i in range(len(optimizers))])
        for i in apart:
            if math.isfinite(found[i]):
                if bounds[i] < found[i] + 1e-6:  # otherwise clipping would multiply by 1
                    nn.utils.clip_grads_with_norm_(_parameters(optimizers[i]), bounds[i], norms[i])
                optimizers[i].step()
        return found

    def _joint_of(self, optimizers: tuple[Optimizer, ...]) -> _Joint:
        """Return what takes the steps of these together; of few others, since jobs come, go and fall out of step."""
        found = self._joint.pop(optimizers, None)
        if found is None or not found.holds():
            found = _Joint(optimizers)
        self._joint[optimizers] = found
        while len(self._joint) > REMEMBERED:
            del self._joint[next(iter(self._joint))]
        return found


class _Joint:
    """The steps of several optimizers in kernels."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        from mlora.ops.fused.adamw import JointAdamW, Moving

        self._optimizers = optimizers
        owned = [(i, group) for i, optimizer in enumerate(optimizers) for group in optimizer.param_groups]
        self._groups = [group for _, group in owned]
        self._states = [optimizer.state for optimizer in optimizers]
        moving = []
        for number, (adapter, group) in enumerate(owned):
            for p in group["params"]:
                if p.grad is not None:
                    own = _state(optimizers[adapter], p)
                    moving.append(Moving(p, p.grad, own["exp_avg"], own["exp_avg_sq"], own["step"], number, adapter))
        self._parameters = [own.parameter for own in moving]
        self._kernels = JointAdamW(moving)
        self._last: list[ref[Tensor]] = []

    def holds(self) -> bool:
        """Return whether it knows all tensors; a state may have been loaded, and other parameters have gradients."""
        same = all(optimizer.state is own for optimizer, own in zip(self._optimizers, self._states, strict=True))
        count = sum(len(_gradients(optimizer)) for optimizer in self._optimizers)
        return same and count == len(self._parameters) and all(p.grad is not None for p in self._parameters)

    def step(self, limits: Sequence[float]) -> Tensor:
        """Take a step and return the norms of the gradients, without waiting."""
        given: list[Any] = [p.grad for p in self._parameters]
        gradients = [gradient.contiguous() for gradient in given]
        moved = not self._last or any(own() is not g for own, g in zip(self._last, gradients, strict=True))
        if moved:
            self._last = [ref(gradient) for gradient in gradients]  # those of graphs last, others make room
        for optimizer in self._optimizers:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # which schedules of torch's ask for
        return self._kernels.step(gradients if moved else None, self._groups, limits)


def _suits(optimizer: Optimizer) -> bool:
    """Return whether kernels take its steps; nothing decides that changes in a training, so that it can be resumed."""
    groups = optimizer.param_groups
    if type(optimizer) is not AdamW or any(g["amsgrad"] or g["maximize"] or 0 in g["betas"] for g in groups):
        return False
    parameters = _parameters(optimizer)
    kinds = {(p.dtype, p.is_contiguous()) for p in parameters}
    return kinds == {(torch.float32, True)} and ops.fused_available(parameters[0])


def _state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return what an AdamW keeps of a parameter, begun as it would begin it."""
    if parameter not in optimizer.state:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer.state[parameter]


def _read(norms: Sequence[Tensor]) -> list[float]:
    """Return numbers, of which some may lie on a device, after one wait."""
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), None)
    return torch.stack([norm.to(device) for norm in norms]).tolist() if norms else []


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
