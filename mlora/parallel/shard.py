"""A frozen base too large for one GPU: every rank holds a part of each decoder layer, and all of it while it runs.

torch's FSDP2 does it. It is given the decoder layers alone: embeddings, the last norm and the output layer are on every
rank, and so are the adapters, whose parameters are none of the layers'. Ranks that share a base run the same number of
forwards and backwards, since each of them takes part in gathering every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


def mesh_of(count: int, device: str) -> DeviceMesh:
    """Return the mesh of all ranks, on "cuda" or "cpu"."""
    return init_device_mesh(device, (count,))


def shard(decoder: nn.Module, layers: Sequence[nn.Module], whole: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this rank its part of every decoder layer, on its device; what is no layer's goes there whole.

    Waits for no other rank, so that one after the other may load a base that lies in the machine's memory once.

    Args:
        decoder: the module whose forward runs the layers.
        layers: the decoder layers, frozen.
        whole: the model, on the CPU.
        mesh: of the ranks.
    """
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu"
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    rest = {parameter for parameter in whole.parameters() if id(parameter) not in inside}
    for parameter in rest:
        parameter.data = parameter.data.to(device)
    for module in whole.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    root: Any = decoder
    fully_shard(root, mesh=mesh, ignored_params=rest)
