"""The order in which a direction visits its time steps and which rows run at each: kernels/rows.py on the host."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, cycle, islice, repeat

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visits:
    """Dense: T steps of B rows, row = t * B + b. Packed: batch_sizes, row = first row of the step + b."""

    time: int
    batch: int
    batch_sizes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, x: Tensor, batch_sizes: Sequence[int] | None) -> Visits:
        """From time-major x [T, B, I], or packed x [N, I] with its batch sizes."""
        if batch_sizes is None:
            return cls(x.shape[0], x.shape[1])
        return cls(len(batch_sizes), batch_sizes[0], tuple(batch_sizes))

    @property
    def stride_row(self) -> int:
        """Rows from `at` to `at` + 1, in buffers of dense rows."""
        return self.batch if self.batch_sizes is None else 1

    @property
    def size_rows(self) -> int:
        """Rows in all."""
        return self.time * self.batch if self.batch_sizes is None else sum(self.batch_sizes)

    @cached_property
    def _starts(self) -> list[int]:
        assert self.batch_sizes is not None
        return [0, *accumulate(self.batch_sizes)]

    def at(self, direction: int, visit: int) -> int:
        """Where visit number `visit` of a direction lies: the time step, or the first row of it; 0 outside 0 .. T-1."""
        if not 0 <= visit < self.time:
            return 0
        t = visit if direction == 0 else self.time - 1 - visit
        return t if self.batch_sizes is None else self._starts[t]

    def rows(self, direction: int, visit: int) -> int:
        """How many rows run at it; 0 outside 0 .. T-1."""
        if not 0 <= visit < self.time:
            return 0
        if self.batch_sizes is None:
            return self.batch
        return self.batch_sizes[visit if direction == 0 else self.time - 1 - visit]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 on the device: rows of each time step, and the first of them; of a dense batch nothing is read."""
        sizes, starts, _ = kept.tables(self.batch_sizes or (0,), device)
        return sizes, starts

    def lengths(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 on the device: how many time steps each row runs, and the first row of each of a packed batch; of a
        dense batch nothing is read."""
        _, starts, lengths = kept.tables(self.batch_sizes or (0,), device)
        return lengths, starts

    def forward(self, D: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Per launch of a forward pass: the rows it has to reach, and kernels/step.py's FORWARD_SCALARS, 0 for a
        direction that is not there.

        Made as they are asked for, and by no Python of ours: kept, they would take 600 bytes a time step.
        """
        columns: list[Iterable[int]] = [cycle((0, 1))]
        reached: list[Sequence[int]] = []
        for direction in range(D):
            at, rows = self._in_order(direction)
            columns += [at, rows, [0, *rows[:-1]], [*rows[1:], 0]]
            reached.append(rows)
        columns += [repeat(0)] * 4 * (2 - D)
        return zip(self._most(reached, self.time), zip(*columns, strict=False), strict=False)

    def backward(self, D: int, want_dh_0: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Per launch of a backward pass: rows, and BACKWARD_SCALARS. The last of several makes dh_0 alone."""
        columns: list[Iterable[int]] = []
        reached: list[Sequence[int]] = []
        for direction in range(D):
            at, rows = ([*values[::-1], 0, 0] for values in self._in_order(direction))
            columns += [islice(values, by, None) for values in (at, rows) for by in (0, 1, 2)]
            # Those of the visit and of the one before it: over time rows never become more.
            reached.append([*rows[1:-2], rows[-3]] if direction == 0 else rows)
        columns += [repeat(0)] * 6 * (2 - D)
        launches = self.time if want_dh_0 or self.time == 1 else self.time - 1
        return zip(self._most(reached, launches), zip(*columns, strict=False), strict=False)

    def _in_order(self, direction: int) -> tuple[Sequence[int], Sequence[int]]:
        """`at` and `rows` of every visit."""
        at: Sequence[int] = range(self.time) if self.batch_sizes is None else self._starts[:-1]
        rows = self.batch_sizes or (self.batch,) * self.time
        return (at, rows) if direction == 0 else (at[::-1], rows[::-1])

    def _most(self, rows: Sequence[Sequence[int]], count: int) -> Iterable[int]:
        """The largest at each of the first `count` places."""
        if self.batch_sizes is None:
            return repeat(self.batch, count)
        return rows[0][:count] if len(rows) == 1 else map(max, rows[0][:count], rows[1])

    def h_prev(self, y: Tensor, h_0: Tensor, direction: int) -> list[tuple[slice, Tensor]]:
        """h_{t-1} of every row of one direction, from its y [N, H] and h_0 [B, H]: (rows, h_prev of these rows).

        Dense: views of y and h_0. Packed: one gathered copy.
        """
        N, B = self.size_rows, self.batch
        if self.batch_sizes is None:
            later = [(slice(B, N), y[: N - B]), (slice(0, B), h_0)]
            earlier = [(slice(0, N - B), y[B:]), (slice(N - B, N), h_0)]
            return [(rows, h) for rows, h in (later if direction == 0 else earlier) if len(h)]
        carried, begun = self._rows_before(direction, y.device)
        return [(slice(0, N), y.index_select(0, carried).index_copy_(0, begun, h_0))]

    def _rows_before(self, direction: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Packed: for every row, the row of y that holds its h_{t-1}, or itself where it begins from h_0; and which
        rows do, in the order of the batch. Made on the device: the host goes on."""
        N = self.size_rows
        sizes, starts = (table.long() for table in self.tables(device))
        t = torch.repeat_interleave(sizes, output_size=N)
        at = torch.arange(N, device=device)
        if direction == 0:  # no step has more rows than the one before it
            return torch.where(at < self.batch, at, at - sizes[t - 1]), at[: self.batch]
        after = torch.nn.functional.pad(sizes[1:], (0, 1))
        carried = torch.where(at - starts[t] < after[t], at + sizes[t], at)
        b = at[: self.batch]
        lengths = self.time - torch.searchsorted(sizes.flip(0), b, right=True)
        return carried, starts[lengths - 1] + b


class Kept:
    """Tables of packed batches, those used last: copying one stalls the host, and may not be captured in a CUDA graph.
    No more than `limit` bytes, keys and what objects take included."""

    def __init__(self, limit: int):
        self.limit = limit
        self._found: OrderedDict[tuple[bytes, torch.device], Tensor] = OrderedDict()  # the longest unused first
        self._bytes = 0
        self._lock = threading.Lock()

    def tables(self, sizes: Sequence[int], device: torch.device) -> Sequence[Tensor]:
        """Rows of each time step [T], the first of them [T], time steps of each row [B]: parts of one tensor."""
        T, B = len(sizes), max(sizes)
        return self._whole(sizes, device).split([T, T, max(1, B)])

    def _whole(self, sizes: Sequence[int], device: torch.device) -> Tensor:
        key = array("i", sizes).tobytes(), device
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        lengths = [0] * max(1, max(sizes))
        for time, (rows, after) in enumerate(zip(sizes, (*sizes[1:], 0), strict=True)):
            lengths[after:rows] = [time + 1] * (rows - after)
        whole = [*sizes, 0, *accumulate(sizes[:-1]), *lengths]
        table = torch.tensor(whole, dtype=torch.int32, device="cpu").to(device)
        with self._lock:
            if key not in self._found and self._size(key) <= self.limit:
                self._found[key] = table
                self._bytes += self._size(key)
            while self._bytes > self.limit:
                self._bytes -= self._size(self._found.popitem(last=False)[0])
        return table

    def clear(self) -> None:
        with self._lock:
            self._found.clear()
            self._bytes = 0

    @staticmethod
    def _size(key: tuple[bytes, torch.device]) -> int:
        """Of an entry: sizes, and its table, of sizes, starts and lengths; and a kilobyte for their objects."""
        return 3 * len(key[0]) + 4 * max(1, array("i", key[0][:4])[0]) + 1024


kept = Kept(4 << 20)
