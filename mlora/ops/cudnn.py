"""Attention over sequences of any length by cuDNN, through its frontend, an optional package.

Made for Hopper, it takes half the time of torch's own flash attention there. Shapes are planned once, which takes a
second or two, so it is for steps that are recorded and come again. Backward has one order of its sums.

Shapes: T tokens of B sequences; H heads of queries, G of keys and values, d wide.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mlora.ops.backend import has_data

log = logging.getLogger(__name__)

WORKSPACE = 1 << 29
"""Bytes that a backward may take besides; they grow with the square of the longest sequence."""


class Shape(NamedTuple):
    """What a plan is made for.

    Attributes:
        sequences, longest, tokens: B, the tokens of the longest sequence that may come, and T.
        heads, groups, width: H, G and d.
        scaling: factor on the scores.
        dtype: float16 or bfloat16.
        device: a GPU.
    """

    sequences: int
    longest: int
    tokens: int
    heads: int
    groups: int
    width: int
    scaling: float
    dtype: torch.dtype
    device: torch.device


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scaling: float | None
) -> Tensor | None:
    """Return causal attention within each sequence [T, H, d], differentiable; None where cuDNN cannot compute it.

    Args:
        q: [T, H, d].
        k, v: [T, G, d].
        offsets: [B + 1] int32, where sequences begin and the last ends.
        longest: tokens that none of them exceeds.
        scaling: factor on the scores; None for d^-0.5.
    """
    alike = q.dtype == k.dtype == v.dtype and q.shape[2] == k.shape[2] == v.shape[2]
    if not alike or q.dtype not in (torch.float16, torch.bfloat16) or not has_data(q) or not _available(q.device):
        return None
    heads, width = q.shape[1:]
    scaling = width**-0.5 if scaling is None else scaling
    shape = Shape(len(offsets) - 1, longest, len(q), heads, k.shape[1], width, scaling, q.dtype, q.device)
    plan = _plan(shape)
    return None if plan is None else _Attention.apply(q, k, v, offsets, plan)


class _Plan:
    """Both passes of one shape.

    Tensors are [B, heads, longest, d] to cuDNN, of which each sequence fills as many rows as it has, and lie token by
    token, each sequence from an offset on.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._places = WeakIdKeyDictionary()
        self._cudnn, self._handle = importlib.import_module("cudnn"), _handle(shape.device)
        self._forward, self._backward = self._forward_graph(), self._backward_graph()
        self.workspaces = [max(1, graph.get_workspace_size()) for graph, _ in (self._forward, self._backward)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [T, H, d] and log-sum-exps [T, H] float32; places [4, B + 1] are from `places`."""
        out, stats = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        self._run(0, places, q=q, k=k, v=v, out=out, stats=stats)
        return out, stats

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        of = [torch.empty_like(t) for t in (q, k, v)]
        tensors = {"q": q, "k": k, "v": v, "out": out, "grad": grad, "stats": stats}
        self._run(1, places, **tensors, of_q=of[0], of_k=of[1], of_v=of[2])
        return of[0], of[1], of[2]

    def places(self, offsets: Tensor) -> Tensor:
        """Return [4, B + 1] int32: where sequences begin in queries, keys and log-sum-exps, and their lengths.

        They are made for the first layer that is asked with these offsets; every step has another tensor of them.
        """
        if offsets not in self._places:
            heads, groups, width = self.shape.heads, self.shape.groups, self.shape.width
            aligned = F.pad(offsets, (0, -len(offsets) % 4))  # rows begin at multiples of 16 bytes
            begins = [aligned * (heads * width), aligned * (groups * width), aligned * heads]
            lengths = F.pad(offsets.diff(), (0, len(aligned) - len(offsets) + 1))
            self._places[offsets] = torch.stack([*begins, lengths])
        return self._places[offsets]

    def _run(self, number: int, places: Tensor, **tensors: Tensor) -> None:
        graph, names = (self._forward, self._backward)[number]
        given = tensors | dict(zip(("of_queries", "of_keys", "of_stats", "lengths"), places, strict=True))
        workspace = torch.empty(self.workspaces[number], dtype=torch.uint8, device=self.shape.device)
        self._cudnn.set_stream(self._handle, torch.cuda.current_stream(self.shape.device).cuda_stream)
        graph.execute({names[name]: tensor for name, tensor in given.items()}, workspace, self._handle)

    def _graph(self) -> tuple[Any, dict[str, Any]]:
        """Return a graph and its tensors by name: q, k and v, offsets and lengths."""
        kinds, shape = self._cudnn.data_type, self.shape
        graph = self._cudnn.pygraph(
            io_data_type=kinds.HALF if shape.dtype == torch.float16 else kinds.BFLOAT16,
            intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT, handle=self._handle,
        )  # fmt: skip
        counts = {"of_queries": 1, "of_keys": 1, "of_stats": 1, "lengths": 0}
        names = {
            name: graph.tensor(
                name=name, dim=[shape.sequences + more, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.INT32
            )
            for name, more in counts.items()
        }
        for name in ("q", "k", "v"):
            names[name] = self._ragged(graph.tensor(name=name, **self._layout(name)), name, names)
        return graph, names

    def _form(self, name: str) -> tuple[str, int, int]:
        """Return where a tensor's sequences begin, its heads and their width."""
        shape = self.shape
        if name == "stats":
            return "of_stats", shape.heads, 1
        return ("of_keys", shape.groups, shape.width) if name[-1] in "kv" else ("of_queries", shape.heads, shape.width)

    def _layout(self, name: str) -> dict[str, list[int]]:
        _, heads, width = self._form(name)
        longest, row = self.shape.longest, heads * width
        return {"dim": [self.shape.sequences, heads, longest, width], "stride": [longest * row, width, row, 1]}

    def _ragged(self, tensor: Any, name: str, names: dict[str, Any]) -> Any:
        """Let a tensor's sequences begin where its offsets say, and return it."""
        tensor.set_ragged_offset(names[self._form(name)[0]])
        return tensor

    def _causal(self, names: dict[str, Any]) -> dict[str, Any]:
        each = {name: names[name] for name in ("q", "k", "v")}
        lengths = {"seq_len_q": names["lengths"], "seq_len_kv": names["lengths"]}
        causal = {"diagonal_alignment": self._cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}
        return {**each, **lengths, **causal, "attn_scale": self.shape.scaling, "use_padding_mask": True}

    def _forward_graph(self) -> tuple[Any, dict[str, Any]]:
        graph, names = self._graph()
        made = graph.sdpa(name="attention", generate_stats=True, **self._causal(names))
        return self._built(graph, names, dict(zip(("out", "stats"), made, strict=True)))

    def _backward_graph(self) -> tuple[Any, dict[str, Any]]:
        graph, names = self._graph()
        for name in ("out", "grad", "stats"):
            kind = {"data_type": self._cudnn.data_type.FLOAT} if name == "stats" else {}
            names[name] = self._ragged(graph.tensor(name=name, **self._layout(name), **kind), name, names)
        made = graph.sdpa_backward(
            name="attention", o=names["out"], dO=names["grad"], stats=names["stats"], **self._causal(names),
            max_total_seq_len_q=self.shape.tokens, max_total_seq_len_kv=self.shape.tokens,
            use_deterministic_algorithm=True,
        )  # fmt: skip
        return self._built(graph, names, dict(zip(("of_q", "of_k", "of_v"), made, strict=True)))

    def _built(self, graph: Any, names: dict[str, Any], outputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for name, tensor in outputs.items():
            layout = self._layout(name)
            tensor.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"])
            if name == "stats":
                tensor.set_data_type(self._cudnn.data_type.FLOAT)
            self._ragged(tensor, name, names)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self._cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return graph, names | outputs


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, plan: _Plan) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        places = plan.places(offsets)
        out, stats = plan.forward(q, k, v, places)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, stats, places)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.plan.backward(grad.contiguous(), *ctx.saved_tensors), None, None


@cache
def _plan(shape: Shape) -> _Plan | None:
    """Plan once for a shape; None where cuDNN has no way, or one that takes much memory."""
    torchs = "torch's flash attention where cuDNN"
    if shape.tokens * shape.heads * shape.width >= 1 << 31:
        _tell(f"{torchs} would count beyond 32 bits")
        return None
    try:
        plan = _Plan(shape)
    except Exception as error:  # what cuDNN refuses is computed by torch
        reason = str(error).partition("\n")[0]
        _tell(f"{torchs} refuses: {reason}")
        return None
    if max(plan.workspaces) > WORKSPACE:
        _tell(f"{torchs} would take more than {WORKSPACE >> 20} MiB besides")
        return None
    _tell("cuDNN")
    return plan


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return importlib.import_module("cudnn").create_handle()


@cache
def _available(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    found = importlib.util.find_spec("cudnn") is not None
    if not found:
        _tell("torch's flash attention: nvidia-cudnn-frontend, which halves its time, is not installed")
    return found


@cache
def _tell(how: str) -> None:
    """Say once by what steps attend."""
    log.info("recorded steps attend by %s", how)
