"""tritongru: a GRU layer for GPUs whose recurrent step is one fused Triton kernel; a drop-in for torch.nn.GRU."""

from ._version import __version__
from .functional import gru, gru_cell
from .module import GRU, GRUCell
from .registry import backends, synchronize, use_backend
from .tools.gates import gates
from .tools.plan import plan

__all__ = [
    "GRU", "GRUCell", "__version__", "backends", "gates", "gru", "gru_cell", "plan", "synchronize", "use_backend",
]  # fmt: skip
