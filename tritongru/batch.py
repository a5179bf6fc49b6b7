"""Which rows of a batch run when, and where a row begins anew: kernels/rows.py on the host.

A direction visits its time steps in an order of its own; a row that does not run keeps its state. Where a row's step t
begins a new sequence, the state that enters it is 0: the forward direction comes to t from t - 1, the reverse one
crosses the same boundary on its way to t - 1.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, cycle, islice, repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from .latest import Latest, capturing, lasting
from .status import LENGTHS_OUTSIDE, status


@dataclass(frozen=True)
class Visits:
    """Dense: T steps of B rows, row = t * B + b. Packed: batch_sizes, row = first row of the step + b. Padded: dense,
    with lengths or resets, in any order."""

    time: int
    batch: int
    batch_sizes: tuple[int, ...] | None = None
    lengths: Tensor | None = field(default=None, compare=False)  # [B] int32: time steps of each row, 1 .. T
    resets: Tensor | None = field(default=None, compare=False)  # [T, B] bool, contiguous: steps that begin a sequence

    @classmethod
    def of(
        cls, x: Tensor, batch_sizes: Sequence[int] | None, lengths: Tensor | None = None, resets: Tensor | None = None,
        batch_first: bool = False,
    ) -> "Visits":  # fmt: skip
        """From x [T, B, I], [B, T, I] with batch_first, or packed [N, I] with its batch sizes."""
        if batch_sizes is not None:
            return cls(len(batch_sizes), batch_sizes[0], tuple(batch_sizes))
        T, B = reversed(x.shape[:2]) if batch_first else x.shape[:2]
        return cls(T, B, None, lengths, resets)

    @property
    def plain(self) -> bool:
        """Dense, and every row runs all time steps without a reset."""
        return self.batch_sizes is None and self.lengths is None and self.resets is None

    def runs(self) -> Tensor | None:
        """[T, B]: where a row of a padded batch runs; None: everywhere."""
        if self.lengths is None:
            return None
        return torch.arange(self.time, device=self.lengths.device)[:, None] < self.lengths

    def cleared(self, direction: int) -> Tensor | None:
        """[T, B]: where the state that enters a row's step is 0 by a reset; None: nowhere."""
        if self.resets is None:
            return None
        runs = self.runs()
        boundaries = self.resets if runs is None else self.resets & runs
        return boundaries if direction == 0 else torch.nn.functional.pad(boundaries[1:], (0, 0, 0, 1))

    def padded(self, rows: Tensor) -> Tensor:
        """`rows`, filled with zeros where some may not run: kernels store nothing there."""
        return rows if self.lengths is None else rows.zero_()

    def only_running(self, rows: Tensor) -> Tensor:
        """Time-major rows [T, B, ...] with zeros where none runs: what lies there may be NaN."""
        runs = self.runs()
        return rows if runs is None else rows.masked_fill(~runs[..., None], 0)

    @property
    def stride_row(self) -> int:
        """Rows from `at` to `at` + 1, in buffers of dense rows."""
        return self.batch if self.batch_sizes is None else 1

    @property
    def size_rows(self) -> int:
        """Rows in all."""
        return self.time * self.batch if self.batch_sizes is None else sum(self.batch_sizes)

    def steps(self, rows: Tensor, direction: int) -> Sequence[Tensor]:
        """Time-major [T, B, ...] or packed [N, ...] as views: the rows that run at each visit of a direction."""
        found = rows.unbind(0) if self.batch_sizes is None else rows.split(list(self.batch_sizes))
        return found if direction == 0 else found[::-1]

    def pointers(self, unread: Tensor) -> dict[str, Tensor]:
        """Kernel arguments: time steps of each row (int32), the first row of each time step of a packed batch (int32),
        and resets (int8). `unread` stands for those that a batch does not have, which no kernel reads."""
        lengths, starts = unread if self.lengths is None else self.lengths, unread
        if self.batch_sizes is not None:
            _, starts, lengths = tables(self.batch_sizes, unread.device)
        resets = (unread if self.resets is None else self.resets).view(torch.int8)
        return dict(lengths_ptr=lengths, starts_ptr=starts, resets_ptr=resets)

    def forward(self, D: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Per launch of a forward pass: the rows it has to reach, and kernels/step.py's FORWARD_SCALARS, 0 for a
        direction that is not there. Made as they are asked for: kept, they would take 600 bytes a time step."""
        columns: list[Iterable[int]] = [cycle((0, 1))]
        every = []
        for direction in range(D):
            at, rows = self._in_order(direction)
            columns += [at, rows, [0, *rows[:-1]], [*rows[1:], 0]]
            every.append(rows)
        scalars = zip(*columns, *[repeat(0)] * 4 * (2 - D), strict=False)
        return zip(map(max, zip(*every, strict=True)), scalars, strict=False)

    def backward(self, D: int, want_dh_0: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Per launch of a backward pass: rows, and BACKWARD_SCALARS. The first has no src, the last may make dh_0."""
        columns: list[Iterable[int]] = []
        every = []
        for direction in range(D):
            at, rows = ([0, *values[::-1], 0, 0] for values in self._in_order(direction))
            columns += [islice(values, by, None) for values in (at, rows) for by in (0, 1, 2)]
            every += [rows, rows[1:]]  # of the visit and of the one before it
        scalars = zip(*columns, *[repeat(0)] * 6 * (2 - D), strict=False)
        return islice(zip(map(max, zip(*every, strict=False)), scalars, strict=False), self.time + want_dh_0)

    def _in_order(self, direction: int) -> tuple[Sequence[int], Sequence[int]]:
        """Where each visit lies, the time step or in a packed batch the first row of it; and how many rows run."""
        at: Sequence[int] = range(self.time)
        if self.batch_sizes is not None:
            at = list(accumulate(self.batch_sizes[:-1], initial=0))
        rows = self.batch_sizes or (self.batch,) * self.time
        return (at, rows) if direction == 0 else (at[::-1], rows[::-1])

    def h_prev(self, y: Tensor, h_0: Tensor, direction: int) -> list[tuple[slice, Tensor]]:
        """h_{t-1} of every row of one direction, from y [..., D * H] and h_0 [D, B, H]: (rows, h_prev of these rows).
        Views of both where each row comes from the one before it; else one copy."""
        (D, B, H), h_0 = h_0.shape, h_0[direction]
        if self.plain and self.time == 1:
            return [(slice(None), h_0)]
        N, y = self.size_rows, y.reshape(-1, D * H)
        y = y if D == 1 else y[:, direction * H : (direction + 1) * H]
        if self.batch_sizes is None and self.resets is None and (self.lengths is None or direction == 0):
            later = [(slice(B, N), y[: N - B]), (slice(0, B), h_0)]
            earlier = [(slice(0, N - B), y[B:]), (slice(N - B, N), h_0)]
            return [(rows, h) for rows, h in (later if direction == 0 else earlier) if h.shape[0]]
        row = torch.arange(N, device=y.device)  # all on the device: the host goes on
        if self.batch_sizes is None:
            starts, t, lengths = row[::B], row // B, self.lengths
        else:
            sizes, starts, lengths = tables(self.batch_sizes, y.device)
            t = torch.repeat_interleave(sizes.long(), output_size=N)
        t_before = (t + (1 if direction else -1)).clamp(0, self.time - 1)
        before = (starts[t_before] + row - starts[t]).clamp(max=N - 1)  # any, where a row begins from h_0
        last = self.time - 1 if lengths is None else lengths.long() - 1
        begins = row[:B] if direction == 0 else starts[last] + row[:B]
        found = y.index_select(0, before).index_copy_(0, begins, h_0)
        if (cleared := self.cleared(direction)) is not None:
            found.masked_fill_(cleared.view(N, 1), 0)
        return [(slice(0, N), found)]


class Rows(NamedTuple):
    """What tells which rows of a batch run when, as tensors: packed ones have batch sizes, padded ones the others."""

    batch_sizes: Tensor | None  # [T] int64 on the CPU
    lengths: Tensor | None = None  # [B] integers, on the device of the batch
    resets: Tensor | None = None  # [T, B] bool

    def visits(self, x: Tensor, batch_first: bool) -> Visits:
        """Of x, with copies: who changes his own tensors changes no gradient."""
        if self.batch_sizes is not None:
            return Visits.of(x, self.batch_sizes.tolist())
        lengths = None if self.lengths is None else checked_lengths(self.lengths, x.shape[1 if batch_first else 0])
        resets = None if self.resets is None else self.resets.clone(memory_format=torch.contiguous_format)
        return Visits.of(x, None, lengths, resets, batch_first)


def checked_lengths(lengths: Tensor, T: int) -> Tensor:
    """`lengths` as int32, clamped to 1 .. T. One outside is a RuntimeError: on the CPU at once, on CUDA at the next
    call that has lengths or runs `sequence`, or at `tritongru.synchronize()`."""
    inside = lengths.clamp(1, T)
    if lengths.is_cuda:
        status(lengths.device).note_lengths((lengths != inside).any())
    elif (wrong := lengths[lengths != inside]).numel():
        raise RuntimeError(f"{LENGTHS_OUTSIDE}: got {int(wrong[0])} where input has {T} steps")
    return inside.to(torch.int32)


def segments(visits: Visits, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A padded batch cut at its resets into the rows of a packed batch, the longest first. Returns where each packed
    row lies among time-major rows, t * B + b [N]; batch sizes; and the first and the last sequence of each row, [B]
    each. Waits for the device."""
    T, B, sequences, first, last = visits.time, visits.batch, list[Tensor](), list[int](), list[int]()
    resets = None if visits.resets is None else visits.resets.cpu()
    for b, length in enumerate([T] * B if visits.lengths is None else visits.lengths.tolist()):
        rows = torch.arange(b, length * B, B, device="cpu")
        first.append(len(sequences))
        sequences += [rows] if resets is None else rows.tensor_split(resets[1:length, b].nonzero().flatten() + 1)
        last.append(len(sequences) - 1)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    in_order = [sequences[i] for i in order]
    packed = pack_padded_sequence(pad_sequence(in_order), [*map(len, in_order)])
    place = torch.tensor(order, device="cpu").argsort()
    return packed.data.to(device), packed.batch_sizes, place[first].to(device), place[last].to(device)


class Table(NamedTuple):
    """On a device. Another stream than that of the copy waits for it."""

    rows: Tensor
    stream: torch.cuda.Stream | None = None  # None: on the CPU
    copied: torch.cuda.Event | None = None


Key = tuple[bytes, torch.device]
# A copy to a device may not be captured. 4 MiB in all, a kilobyte for the objects of each.
kept: Latest[Key, Table] = Latest(4 << 20, lambda key, table: len(key[0]) + table.rows.nbytes + 1024)
in_graphs: dict[Key, Table] = {}  # which captured graphs read, whatever else is kept


def tables(sizes: Sequence[int], device: torch.device) -> Sequence[Tensor]:
    """Of a packed batch, int32: rows of each time step [T], the first of them [T], time steps of each row [B]."""
    key = array("i", sizes).tobytes(), device
    table = kept.get(key, in_graphs.get(key))
    if table is None:
        lengths = [0] * sizes[0]
        for time, (rows, after) in enumerate(zip(sizes, (*sizes[1:], 0), strict=True)):
            lengths[after:rows] = [time + 1] * (rows - after)
        table = _copied([*sizes, 0, *accumulate(sizes[:-1]), *lengths], device)
        kept.keep(key, table)
    if capturing(device):
        in_graphs[key] = table
    elif table.copied is not None and (stream := torch.cuda.current_stream(device)) != table.stream:
        stream.wait_event(table.copied)
        table.rows.record_stream(stream)
    return table.rows.split([len(sizes), len(sizes), sizes[0]])


def _copied(values: Sequence[int], device: torch.device) -> Table:
    """As int32 on a device, from pinned memory: neither the host waits nor what the device does before."""
    on_gpu = device.type == "cuda"

    def made() -> Tensor:
        rows = torch.tensor(values, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        return rows.to(device, non_blocking=True)

    rows = lasting(made, device, wait=False)
    stream = torch.cuda.current_stream(device) if on_gpu else None
    return Table(rows, stream, stream.record_event() if stream is not None else None)
