"""Hundreds of matrices copied in two or three launches, cast or turned.

A step casts every matrix of every adapter, and turns gradients of experts. Tables say where each matrix lies and which
tile of which matrix a program copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.copies import Pairs

ELEMENTS = 4096
"""Of a tile."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _copy(
    places, forms, owners, SOURCE: tl.constexpr, TARGET: tl.constexpr, ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    matrix = tl.load(owners + tl.program_id(0)).to(tl.int64)
    source = tl.load(places + 2 * matrix).to(tl.pointer_type(SOURCE))
    target = tl.load(places + 2 * matrix + 1).to(tl.pointer_type(TARGET))
    form = forms + 5 * matrix
    rows, columns = tl.load(form), tl.load(form + 1)
    row_step, column_step = ROW_STEP, COLUMN_STEP
    if ROW_STEP == 0:
        row_step = tl.load(form + 2)
    if COLUMN_STEP == 0:
        column_step = tl.load(form + 3)
    tile = tl.program_id(0) - tl.load(form + 4)
    across = tl.cdiv(columns, BC)
    r = (tile // across) * BR + tl.arange(0, BR)
    c = (tile % across) * BC + tl.arange(0, BC)
    both = (r < rows)[:, None] & (c < columns)[None, :]
    value = tl.load(source + r[:, None] * row_step + c[None, :] * column_step, mask=both, other=0.0)
    tl.store(target + r[:, None] * columns + c[None, :], value.to(TARGET), mask=both)


class _Kind(NamedTuple):
    """Matrices of one launch.

    Attributes:
        source, target: dtypes.
        row_step, column_step: 1 where neighbours lie side by side in the source, else 0.
        tile_rows: of a tile.
    """

    source: torch.dtype
    target: torch.dtype
    row_step: int
    column_step: int
    tile_rows: int


class _Tables(NamedTuple):
    """Of one launch.

    Attributes:
        places: [m, 2] addresses of source and target.
        forms: [m, 5] rows, columns, the source's steps, the first tile.
        owners: [tiles] the matrix of each.
    """

    places: Tensor
    forms: Tensor
    owners: Tensor


class FusedCopies:
    """`ops.Copies` by tables, which a graph's own memory could not hold: its kernels write there before and after."""

    def __init__(self, pairs: Pairs) -> None:
        self._host = _tables(pairs)
        device = pairs[0][1].device
        self._tables = {kind: _Tables(*(t.to(device) for t in own)) for kind, own in self._host.items()}

    def launch(self, pairs: Pairs) -> Callable[[], None]:
        found = _tables(pairs)
        if found.keys() != self._host.keys() or any(
            not torch.equal(own.forms, self._host[kind].forms) for kind, own in found.items()
        ):
            raise RuntimeError("the tensors to copy have other forms than before")

        def write() -> None:
            for kind, own in found.items():
                self._tables[kind].places.copy_(own.places)

        recorded = _recording(pairs[0][1])
        if not recorded:
            write()
        for kind, tables in self._tables.items():
            _copy[(len(tables.owners),)](
                *tables, _TYPES[kind.source], _TYPES[kind.target], kind.row_step, kind.column_step, kind.tile_rows,
                ELEMENTS // kind.tile_rows,
            )  # fmt: skip
        return write if recorded else lambda: None


def shared_out(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first tile of each tensor, from how many each has, and whose each tile is (int32)."""
    return tiles.cumsum(0) - tiles, torch.arange(len(tiles), dtype=torch.int32).repeat_interleave(tiles)


def _recording(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _tables(pairs: Pairs) -> dict[_Kind, _Tables]:
    """Return the tables of each launch, on the host."""
    found: dict[_Kind, list[tuple[int, ...]]] = defaultdict(list)
    for source, target in pairs:
        for kind, *matrix in _matrices(source, target):
            found[kind].append(tuple(matrix))
    made = {}
    for kind, matrices in found.items():
        every = torch.tensor(matrices, dtype=torch.int64)
        rows, columns = every[:, 2], every[:, 3]
        tiles = -(-rows // kind.tile_rows) * -(-columns // (ELEMENTS // kind.tile_rows))
        firsts, owners = shared_out(tiles)
        forms = torch.cat([every[:, 2:], firsts[:, None]], 1)
        made[kind] = _Tables(every[:, :2].contiguous(), forms, owners)
    return made


def _matrices(source: Tensor, target: Tensor) -> Iterator[tuple[_Kind, int, int, int, int, int, int]]:
    """Yield kind, addresses, rows, columns and the source's steps of each matrix of a tensor."""
    if source.is_contiguous():
        source, target = source.view(1, 1, -1), target.view(1, 1, -1)
    lead = (1,) * (3 - source.ndim)
    source, target = source.view(*lead, *source.shape), target.view(*lead, *target.shape)
    count, rows, columns = source.shape
    step, row_step, column_step = source.stride()
    narrowest = max(16, triton.next_power_of_2(columns))
    tile_rows = 1 if rows == 1 else 16 if row_step == 1 or columns > 64 else ELEMENTS // narrowest
    kind = _Kind(source.dtype, target.dtype, int(row_step == 1), int(column_step == 1), tile_rows)
    begin, end = source.data_ptr(), target.data_ptr()
    for i in range(count):
        places = begin + i * step * source.itemsize, end + i * rows * columns * target.itemsize
        yield kind, *places, rows, columns, row_step, column_step
