"""The tensors of a launch, by their addresses."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}  # from bytes to elements


@dataclass(frozen=True)
class Extent:
    """The addresses [begin, end) of one tensor argument: from its first element to its last, strides considered."""

    name: str
    begin: int
    end: int
    itemsize: int

    @property
    def size(self) -> int:
        return (self.end - self.begin) // self.itemsize

    def distance(self, address: int) -> int:
        """Bytes from the extent to `address`; 0 inside."""
        return max(self.begin - address, address - (self.end - 1), 0)

    def place(self, address: int) -> int:
        """The number of the element there."""
        return (address - self.begin) // self.itemsize


class Memory:
    """The tensors of a launch."""

    def __init__(self, extents: Sequence[Extent]):
        self.extents = extents
        self.begins: list[int] = []  # of regions that no other touches, in order
        self.ends: list[int] = []
        for extent in sorted(extents, key=lambda extent: extent.begin):
            if self.ends and extent.begin <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], extent.end)
            else:
                self.begins.append(extent.begin)
                self.ends.append(extent.end)
        self._views: dict[tuple[int, np.dtype], tuple[int, np.ndarray]] = {}

    def view(self, begin: int, last: int, kind: np.dtype) -> tuple[int, np.ndarray] | None:
        """The region that holds elements from `begin` to `last`: its address and itself as an array; None if no one
        region does."""
        i = bisect_right(self.begins, begin) - 1
        if i < 0 or last + kind.itemsize > self.ends[i]:
            return None
        found = self._views.get((i, kind))
        if found is None:
            start = self.begins[i] & -16
            count = (self.ends[i] - start) // kind.itemsize
            buffer = (ctypes.c_uint8 * (count * kind.itemsize)).from_address(start)
            found = self._views[i, kind] = start, np.ctypeslib.as_array(buffer).view(kind)
        return found

    def parts(self, addresses: np.ndarray, kind: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of flat addresses in several regions: which of them, the region as an array, their places in it."""
        region = np.searchsorted(self.begins, addresses, side="right") - 1
        for i in np.unique(region):
            chosen = np.flatnonzero(region == i)
            found = self.view(self.begins[i], self.begins[i], kind)
            assert found is not None
            start, view = found
            yield chosen, view, (addresses[chosen] - start) >> SHIFT[kind.itemsize]

    def gather(self, addresses: Any, kind: np.dtype, ends: tuple[int, int]) -> Any:
        """Elements inside the tensors; `ends` are the least and the greatest address, or lie around them."""
        found = self.view(*ends, kind)
        if found is not None:
            start, view = found
            return view.take((addresses - start) >> SHIFT[kind.itemsize])
        flat = addresses.reshape(-1)
        out = np.empty(flat.shape, kind)
        for chosen, view, places in self.parts(flat, kind):
            out[chosen] = view[places]
        return out.reshape(addresses.shape)

    def scatter(self, addresses: Any, values: Any, ends: tuple[int, int]) -> None:
        """Values, raw and of the addresses' shape, to places inside the tensors."""
        found = self.view(*ends, values.dtype)
        if found is not None:
            start, view = found
            view[(addresses - start) >> SHIFT[values.dtype.itemsize]] = values
            return
        flat, values = addresses.reshape(-1), values.reshape(-1)
        for chosen, view, places in self.parts(flat, values.dtype):
            view[places] = values[chosen]

    def fault(self, addresses: Any, itemsize: int, ends: tuple[int, int]) -> str | None:
        """What is wrong with an access, if anything is."""
        begin, last = ends
        i = bisect_right(self.begins, begin) - 1
        if (begin | last) & (itemsize - 1):
            return f"{addresses.size} elements at addresses that are no multiples of {itemsize}"
        if i >= 0 and last + itemsize <= self.ends[i]:
            return None
        flat = np.atleast_1d(addresses).reshape(-1)
        region = np.searchsorted(self.begins, flat, side="right") - 1
        behind = np.asarray([*self.ends, 0])  # no region: number -1
        outside = flat[flat + itemsize > behind[region]]
        if not outside.size:
            return None
        first = int(outside[0])
        nearest = min(self.extents, key=lambda extent: extent.distance(first), default=None)
        place = "no tensor was passed"
        if nearest is not None:
            place = f"the first would be {nearest.name}[{nearest.place(first)}] of {nearest.size}, the nearest argument"
        return f"{outside.size} elements outside every tensor; {place}"


def span(addresses: Any) -> tuple[int, int]:
    """The least and the greatest address."""
    if addresses.ndim == 0:
        return int(addresses), int(addresses)
    return int(addresses.min()), int(addresses.max())


def extents_of(name: str, value: Any) -> Iterator[Extent]:
    """Of the tensors in one argument of a kernel."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from extents_of(f"{name}[{i}]", part)
    elif isinstance(value, torch.Tensor) and value.numel():
        elements = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        begin, itemsize = value.data_ptr(), value.element_size()
        yield Extent(name, begin, begin + elements * itemsize, itemsize)
