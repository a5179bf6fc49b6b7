"""The order in which a direction visits its time steps and which rows run at each: kernels/rows.py on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

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
        return _tables(self.batch_sizes, device)

    def lengths(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 on the device: how many time steps each row runs, and the first row of each of a packed batch; of a
        dense batch nothing is read."""
        return _lengths(self.batch_sizes, device), _tables(self.batch_sizes, device)[1]

    def forward(self, D: int) -> list[tuple[int, tuple[int, ...]]]:
        """Per launch of a forward pass: the rows it has to reach, and kernels/step.py's FORWARD_SCALARS."""
        return _forward(self, D)

    def backward(self, D: int) -> list[tuple[int, tuple[int, ...]]]:
        """Per launch of a backward pass, the last one for dh_0 included: rows, and BACKWARD_SCALARS."""
        return _backward(self, D)

    def h_prev(self, y: Tensor, h_0: Tensor, direction: int) -> list[tuple[slice, Tensor]]:
        """h_{t-1} of every row of one direction, from its y [N, H] and h_0 [B, H]: (rows, h_prev of these rows).

        Dense: views of y and h_0. Packed: one gathered copy.
        """
        N, B = self.size_rows, self.batch
        if self.batch_sizes is None:
            later = [(slice(B, N), y[: N - B]), (slice(0, B), h_0)]
            earlier = [(slice(0, N - B), y[B:]), (slice(N - B, N), h_0)]
            return [(rows, h) for rows, h in (later if direction == 0 else earlier) if len(h)]
        return [(slice(0, N), torch.cat([y, h_0]).index_select(0, _carried_rows(self, direction, y.device)))]


@lru_cache(maxsize=32)
def _carried_rows(visits: Visits, direction: int, device: torch.device) -> Tensor:
    """Packed: for every row, the row of [y; h_0] that holds its h_{t-1}. Kept, for building it stalls the host."""
    assert visits.batch_sizes is not None
    sizes = torch.tensor(visits.batch_sizes)
    starts = torch.tensor(visits._starts[:-1])
    t = torch.repeat_interleave(torch.arange(visits.time), sizes)
    row = torch.arange(visits.size_rows) - starts[t]
    before = t - 1 if direction == 0 else t + 1
    inside = (before >= 0) & (before < visits.time)
    before = before.clamp(0, visits.time - 1)
    carries = inside & (row < sizes[before])
    index = torch.where(carries, starts[before] + row, visits.size_rows + row)  # rows of h_0 follow those of y
    return index.to(device)


@lru_cache(maxsize=32)
def _tables(batch_sizes: tuple[int, ...] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = batch_sizes or (0,)
    starts = [0, *accumulate(sizes[:-1])]
    on_host = torch.tensor([sizes, starts], dtype=torch.int32)
    of_sizes, of_starts = on_host.to(device).unbind()
    return of_sizes, of_starts


@lru_cache(maxsize=32)
def _lengths(batch_sizes: tuple[int, ...] | None, device: torch.device) -> Tensor:
    sizes = torch.tensor(batch_sizes or (0,))
    rows = torch.arange(max(1, int(sizes[0])))
    return (sizes[None, :] > rows[:, None]).sum(1, dtype=torch.int32).to(device)


# What a shape's launches are told does not change from call to call: kept, for the host's time per step is theirs.
@lru_cache(maxsize=32)
def _forward(visits: Visits, D: int) -> list[tuple[int, tuple[int, ...]]]:
    found = []
    for visit in range(visits.time):
        scalars = [visit % 2]
        for direction in (0, 1):
            rows = [visits.rows(direction, v) for v in (visit, visit - 1, visit + 1)]
            scalars += [visits.at(direction, visit), *rows]
        found.append((max(visits.rows(direction, visit) for direction in range(D)), tuple(scalars)))
    return found


@lru_cache(maxsize=32)
def _backward(visits: Visits, D: int) -> list[tuple[int, tuple[int, ...]]]:
    found = []
    for src in reversed(range(visits.time)):
        scalars: list[int] = []
        for direction in (0, 1):
            scalars += [visits.at(direction, visit) for visit in (src, src - 1, src - 2)]
            scalars += [visits.rows(direction, visit) for visit in (src, src - 1, src - 2)]
        rows = max(visits.rows(direction, visit) for direction in range(D) for visit in (src, src - 1))
        found.append((rows, tuple(scalars)))
    return found
