"""The tensors of a launch, by their addresses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from .values import EmulatorError

FIRST = 1 << 12  # no address is below


class OutOfBounds(EmulatorError):  # noqa: N818
    """An access outside every tensor passed to the kernel."""


@cache
def everything(kind: np.dtype) -> np.ndarray:
    """The process's address space from FIRST on, as elements of one type: whoever reads or writes has checked where."""
    told = {"version": 3, "data": (FIRST, False), "shape": (2**47 // kind.itemsize,), "typestr": kind.str}
    return np.asarray(SimpleNamespace(__array_interface__=told))


@dataclass(frozen=True)
class Extent:
    """The addresses [begin, end) of one tensor argument: from its first element to its last, strides considered."""

    name: str
    begin: int
    end: int
    itemsize: int

    def holds(self, *addresses: int) -> bool:
        return all(self.begin <= address < self.end for address in addresses)

    def place(self, address: int) -> int:
        """The number of the element there."""
        return (address - self.begin) // self.itemsize


def extents_of(name: str, value: Any) -> Iterator[Extent]:
    """Of the tensors in one argument of a kernel."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from extents_of(f"{name}[{i}]", part)
    elif isinstance(value, torch.Tensor) and value.numel():
        elements = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        begin, itemsize = value.data_ptr(), value.element_size()
        yield Extent(name, begin, begin + elements * itemsize, itemsize)


class Memory:
    """The tensors of a launch."""

    def __init__(self, arguments: Mapping[str, Any]):
        self.extents = [extent for name, value in arguments.items() for extent in extents_of(name, value)]
        self.begins: list[int] = []  # of regions that no other touches, in order
        self.ends: list[int] = []
        for extent in sorted(self.extents, key=lambda extent: extent.begin):
            if self.ends and extent.begin <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], extent.end)
            else:
                self.begins.append(extent.begin)
                self.ends.append(extent.end)

    def checked(self, verb: str, addresses: Any, itemsize: int) -> tuple[int, int]:
        """The least and the greatest address of an access to be made."""
        begin, last = (int(addresses.min()), int(addresses.max())) if addresses.ndim else (int(addresses),) * 2
        if (begin | last) & (itemsize - 1):
            raise OutOfBounds(f"{verb} {addresses.size} elements at addresses that are no multiples of {itemsize}")
        i = bisect_right(self.begins, begin) - 1
        if i < 0 or last + itemsize > self.ends[i]:  # not in one region: each for itself
            flat = np.atleast_1d(addresses).reshape(-1)
            region = np.searchsorted(self.begins, flat, side="right") - 1
            outside = flat[flat + itemsize > np.asarray([*self.ends, 0])[region]]  # no region: number -1
            if outside.size:
                place = self.nearest(int(outside[0]))
                raise OutOfBounds(f"{verb} {outside.size} elements outside every tensor; {place}")
        return begin, last

    def load(self, addresses: Any, kind: np.dtype) -> Any:
        return everything(kind).take((addresses - FIRST) >> (kind.itemsize.bit_length() - 1))

    def store(self, addresses: Any, values: np.ndarray) -> None:
        everything(values.dtype)[(addresses - FIRST) >> (values.itemsize.bit_length() - 1)] = values

    def nearest(self, address: int) -> str:
        def distance(extent: Extent) -> int:
            return max(extent.begin - address, address - extent.end)

        nearest = min(self.extents, key=distance, default=None)
        if nearest is None:
            return "no tensor was passed"
        elements = nearest.place(nearest.end)
        return f"the first would be {nearest.name}[{nearest.place(address)}] of {elements}, the nearest argument"

    def name(self, *ends: int) -> str:
        """Of an element, or of those between two addresses."""

        def named(extent: Extent) -> str:
            return f"{extent.name}[{' .. '.join(str(extent.place(end)) for end in dict.fromkeys(ends))}]"

        return "/".join(named(extent) for extent in self.extents if extent.holds(*ends)) or "several arguments"
