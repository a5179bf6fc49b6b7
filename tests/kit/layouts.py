"""Who has which element, by the compiler's own account of a layout."""

from typing import Any

import numpy as np
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language._semantic import GluonSemantic


def places(layout: Any, shape: list[int]) -> np.ndarray:
    """The element of each register of each lane of each warp: [warps, 32, registers, dimensions]."""
    context = ir.context()
    ir.load_dialects(context)
    linear = GluonSemantic(gluon_ir.GluonOpBuilder(context)).to_linear_layout(layout, shape).value
    found = np.zeros((1, 1, 1, len(shape)), int)
    for bases, axis in ((linear.reg_bases, 2), (linear.lane_bases, 1), (linear.warp_bases, 0)):
        for base in bases:
            found = np.concatenate([found, found ^ np.array(base)], axis)
    return found
