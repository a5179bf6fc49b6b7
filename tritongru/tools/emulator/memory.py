"""The tensors of a launch, by their addresses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import cache
from itertools import accumulate
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


class Memory:
    """The tensors of a launch."""

    def __init__(self, arguments: Mapping[str, Any]):
        self.extents: list[tuple[int, int, int, str]] = []  # [begin, end), size of an element, name; strides considered
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                begin, itemsize = tensor.data_ptr(), tensor.element_size()
                self.extents.append((begin, begin + elements * itemsize, itemsize, name))
        self.extents.sort()
        self.begins = [begin for begin, *_ in self.extents]
        self.ends = list(accumulate((end for _, end, *_ in self.extents), max))  # of all that begin no later

    def checked(self, verb: str, addresses: Any, itemsize: int) -> tuple[int, int]:
        """The least and the greatest address of an access to be made."""
        if not addresses.size:
            return 0, -1
        begin, last = int(addresses.min()), int(addresses.max())
        if (begin | last) & (itemsize - 1):
            raise OutOfBounds(f"{verb} {addresses.size} elements at addresses that are no multiples of {itemsize}")
        i = bisect_right(self.begins, begin) - 1
        if i < 0 or last + itemsize > self.ends[i]:  # perhaps in several tensors: each for itself
            flat = addresses.reshape(-1)
            tensor = np.searchsorted(self.begins, flat, side="right") - 1
            outside = flat[flat + itemsize > np.asarray([*self.ends, 0])[tensor]]  # before all of them: number -1
            if outside.size:
                first = self.name(int(outside[0]))
                raise OutOfBounds(f"{verb} {outside.size} elements outside every tensor, the first {first}")
        return begin, last

    def load(self, addresses: Any, kind: np.dtype) -> Any:
        return everything(kind).take((addresses - FIRST) >> (kind.itemsize.bit_length() - 1))

    def store(self, addresses: Any, values: np.ndarray) -> None:
        everything(values.dtype)[(addresses - FIRST) >> (values.itemsize.bit_length() - 1)] = values

    def name(self, address: int) -> str:
        """Of an element, by the argument that holds it or is the nearest."""
        begin, end, itemsize, name = min(self.extents, key=lambda e: max(e[0] - address, address - e[1] + 1, 0))
        return f"{name}[{(address - begin) // itemsize}] of {(end - begin) // itemsize}"
