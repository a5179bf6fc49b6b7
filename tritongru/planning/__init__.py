"""What would run and why: `choose`, a pure function of a problem and a described device. Needs no GPU, no Triton."""

from .choose import Plan, choose
from .devices import Device, describe
from .problem import Problem

__all__ = ["Device", "Plan", "Problem", "choose", "describe"]
