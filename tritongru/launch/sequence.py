"""Launcher of kernels/sequence.py: one launch per sequence, each way (one per direction where both do not fit at once).

forward    sequence_forward; around it the product x_proj, a padded copy of W_hh, the fill of the exchange buffer
backward   sequence_backward; around it a padded copy of W_hh^T, the fill of dgates; the library products over all T
           are tritongru/launch/products.py
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import sequence as kernels
from ..planning.devices import Device
from ..planning.problem import Problem
from ..planning.sequence import VECTOR, SequenceTiles, padded, sequence_tiles
from . import step
from .concurrent import running_concurrently
from .interpreter import repair
from .layer import LayerCall, LayerWeights, SavedGates, rzn_strides
from .parts import part
from .products import project
from .runtime import Launch, Specimen, empty, interpreted

logger = logging.getLogger("tritongru")

SENTINEL = -1
WAIT_SECONDS = 10.0  # how long a program waits for another, unless TRITONGRU_WAIT_SECONDS says otherwise


class Status:
    """Whether a wait ran out on a device: a word there, which waiting programs look at, and one that the host reads."""

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():  # these words outlive the graph, and its memory pool
            raise RuntimeError(
                f"backend 'sequence' has not run on {device} yet: call a layer once before the capture of a CUDA graph"
            )
        with torch.inference_mode(False):  # whatever mode the first call is in, these are written again
            self.word = torch.zeros(1, dtype=torch.int32, device=device)
            self.report = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=cuda)
        if cuda:
            torch.cuda.current_stream(device).synchronize()  # once: another stream may be the first to read the word
        self.seconds = WAIT_SECONDS  # the bound of the last launch

    def check(self) -> None:
        """Raise if a wait ran out since the last look. Reads host memory: no wait for the device, but for the error."""
        if self.report.item():
            if self.word.is_cuda:
                torch.cuda.synchronize(self.word.device)  # kernels that are still running would report once more
            self.report.zero_()
            self.word.zero_()
            raise RuntimeError(
                f"a wait between the programs of a tritongru sequence kernel ran out on {self.word.device} after "
                f"{self.seconds:g} s: results since then are NaN. The device was shared, stopped or far slower than "
                "expected (a debugger, a sanitizer): set TRITONGRU_WAIT_SECONDS higher, or use backend='step'"
            )


_creating = threading.Lock()
_statuses: dict[torch.device, Status] = {}


def status(device: torch.device) -> Status:
    """The status words of a device, made at its first use."""
    if device not in _statuses:
        with _creating:
            if device not in _statuses:
                _statuses[device] = Status(device)
    return _statuses[device]


def check_all() -> None:
    """Raise the error of any device whose kernels gave up a wait."""
    for found in tuple(_statuses.values()):
        found.check()


def wait_seconds() -> float:
    """The bound of a wait. Raises ValueError for a TRITONGRU_WAIT_SECONDS that is no positive number below 2000."""
    given = os.environ.get("TRITONGRU_WAIT_SECONDS")
    if given is None:
        return WAIT_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 2000:
        raise ValueError(f"TRITONGRU_WAIT_SECONDS must be a number above 0 and below 2000, got {given!r}")
    return seconds


@part("recurrence")
def forward(call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor, SavedGates | None]:
    """As launch/step.py's forward."""
    tiles = _tiles("forward", call)
    if tiles is None:
        return step.forward(call, x, h_0, weights)
    visits, D, H = call.visits, call.directions, call.hidden_size
    B, P = visits.batch, padded(H)
    device, dtype = x.device, x.dtype
    x, h_0 = x.resolve_neg(), h_0.resolve_neg()  # a kernel reads memory, where a lazily negated tensor is not negated
    by_row = x.shape[:-1]
    rzn = project(x, weights.w_ih, weights.b_ih).view(*by_row, D, 3 * H)
    q = empty(*by_row, D, H, dtype=dtype, device=device) if call.save_gates else None
    y = empty(*by_row, D * H, dtype=dtype, device=device)
    h_n = empty(D, B, H, dtype=dtype, device=device)
    own_exchange = tiles.exchange and P != H  # else y itself is the exchange buffer: its rows have whole vectors
    exchange = empty(*by_row, D * P, dtype=dtype, device=device) if own_exchange else y
    state = empty(D, B, H, dtype=torch.float32, device=device) if tiles.exchange else h_n
    first, last = weights.direction(0), weights.direction(-1)
    arguments = dict(
        rzn_ptr=rzn, q_ptr=y if q is None else q, y_ptr=y, e_ptr=_bits(exchange, fill=tiles.exchange),
        h_0_ptr=_padded_rows(h_0, P), h_n_ptr=h_n, state_ptr=state, b_ptr=first.b_hh, b_reverse_ptr=last.b_hh,
        **_weights(tiles, weights, transpose=False),
    )  # fmt: skip
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    scalars = dict(
        stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b, save_gates=int(call.save_gates),
        own_exchange=int(own_exchange), has_bias=int(bool(weights.b_hh)),
    )  # fmt: skip
    if not _launch(kernels.sequence_forward, kernels.FORWARD_SCALARS, call, tiles, arguments, scalars):
        return step.forward(call, x, h_0, weights)
    return y, h_n, None if q is None else SavedGates(rzn, q)


@part("recurrence")
def backward(
    call: LayerCall,
    dy: Tensor,
    dh_n: Tensor,
    y: Tensor,
    h_0: Tensor,
    gates: SavedGates,
    weights: LayerWeights,
    dh_0_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """As launch/step.py's backward; dgates [D, rows, 4P] with P, H padded to whole vectors."""
    tiles = _tiles("backward", call)
    if tiles is None:
        return step.backward(call, dy, dh_n, y, h_0, gates, weights, dh_0_dtype)
    visits, D, H = call.visits, call.directions, call.hidden_size
    B, N, P = visits.batch, visits.size_rows, padded(H)
    device, dtype = y.device, y.dtype
    dy, h_0 = dy.resolve_neg(), h_0.resolve_neg()
    dh_n = dh_n.resolve_neg().to(torch.float32).contiguous()  # as dh_0 in float32 always: one kernel, in chunks too
    y, (rzn, q) = y.contiguous(), gates.laid_out()  # as forward made them, unless a hook on saved tensors re-laid them
    dgates = empty(D, N, 4 * P, dtype=dtype, device=device)
    dh_0 = empty(D, B, H, dtype=torch.float32, device=device)
    state = empty(D, B, H, dtype=torch.float32, device=device) if tiles.exchange else dh_0
    arguments = dict(
        dy_ptr=dy, dh_n_ptr=dh_n, rzn_ptr=rzn, q_ptr=q, y_ptr=y, h_0_ptr=_padded_rows(h_0, P),
        e_ptr=_bits(dgates, fill=tiles.exchange), state_ptr=state, dh_0_ptr=dh_0,
        **_weights(tiles, weights, transpose=True),
    )  # fmt: skip
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    scalars = dict(
        stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b, size_rows=N, stride_dy_t=dy.stride(0),
        stride_dy_b=dy.stride(-2), stride_dy_h=dy.stride(-1), want_dh_0=int(dh_0_dtype is not None),
    )  # fmt: skip
    if not _launch(kernels.sequence_backward, kernels.BACKWARD_SCALARS, call, tiles, arguments, scalars):
        return step.backward(call, dy, dh_n, y, h_0, gates, weights, dh_0_dtype)
    return dgates, dh_0.to(dh_0_dtype) if dh_0_dtype else None


_refused: set[str] = set()  # names of devices whose driver refused a cooperative launch in this process


def _tiles(kind: str, call: LayerCall) -> SequenceTiles | None:
    """The tiles of a pass; None where `step` has to serve it, because the driver refuses what the plan counts on.

    Raises:
        RuntimeError: the device cannot hold the weights; or programs that wait for each other would be interpreted one
            after another.
    """
    tiles = sequence_tiles(
        kind, call.visits.batch, call.hidden_size, call.directions, call.dtype, call.precision, call.device
    )
    if isinstance(tiles, str):
        raise RuntimeError(f"backend 'sequence' cannot run here: {tiles}; backend 'step' can")
    if not tiles.exchange:
        return tiles
    if interpreted(kernels.sequence_forward) and not running_concurrently():
        raise RuntimeError(
            f"Triton's interpreter runs programs one after another, and the {tiles.programs} programs of this plan "
            "wait for each other: run it inside tritongru.launch.concurrent.concurrent(), or with a one-program plan"
        )
    return None if call.device.name in _refused else tiles


@part("fill")
def _bits(buffer: Tensor, fill: bool) -> Tensor:
    """The buffer as integers, full of sentinels if asked for."""
    bits = buffer.view(torch.int32 if buffer.dtype == torch.float32 else torch.int16)
    return bits.fill_(SENTINEL) if fill else bits


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _padded_rows(h_0: Tensor, P: int) -> Tensor:
    """h_0 as [D, B, P], rows of whole vectors, aligned; itself where it is so already."""
    if h_0.shape[-1] != P:
        return torch.nn.functional.pad(h_0, (0, P - h_0.shape[-1]))
    return _aligned(h_0.contiguous())


@part("weights")
def _weights(tiles: SequenceTiles, weights: LayerWeights, transpose: bool) -> dict[str, Tensor]:
    """W_hh of both directions as [3, units, K], each gate's transposed if asked for, padded with zeros and aligned."""
    U, K = tiles.programs * tiles.block_h, tiles.num_k * tiles.block_k

    def slices(w_hh: Tensor) -> Tensor:
        H = w_hh.shape[-1]
        w = w_hh.view(3, H, H)
        if transpose:
            w = w.transpose(1, 2)
        if (U, K) != (H, H):
            return torch.nn.functional.pad(w, (0, K - H, 0, U - H))
        return _aligned(w.contiguous())

    first = slices(weights.w_hh[0])
    return {"w_ptr": first, "w_reverse_ptr": first if len(weights.w_hh) == 1 else slices(weights.w_hh[1])}


def _launch(
    kernel: Any,
    names: tuple[str, ...],
    call: LayerCall,
    tiles: SequenceTiles,
    arguments: Mapping[str, Any],
    scalars: Mapping[str, int],
) -> bool:
    """Launch a pass, both directions at once or one after the other; False where the driver refuses."""
    visits, device = call.visits, arguments["rzn_ptr"].device
    found = status(device)
    found.check()
    found.seconds = wait_seconds()
    if interpreted(kernel):
        repair()
    sizes, starts = visits.tables(device)
    scalars = dict(
        T=visits.time, B=visits.batch, H=call.hidden_size, D=call.directions, tiles=tiles.tiles,
        stride_row=visits.stride_row, packed=int(visits.batch_sizes is not None),
        vectors=padded(call.hidden_size) // VECTOR, bound=int(1e6 * found.seconds), **scalars,
    )  # fmt: skip
    words = dict(sizes_ptr=sizes, starts_ptr=starts, status_ptr=found.word, report_ptr=found.report)
    launch = Launch(
        kernel, names, {**arguments, **words, **_constants(tiles, call.precision)}, tiles.num_warps, num_stages=1,
        cooperative=tiles.exchange, max_registers=tiles.max_registers,
    )  # fmt: skip
    for direction in range(0, call.directions, tiles.directions):
        values = {**scalars, "first_direction": direction}
        try:
            launch(tiles.grid, [values[name] for name in names])
        except RuntimeError as error:
            if not tiles.exchange or not any(word in str(error).lower() for word in ("cooperative", "not supported")):
                raise
            logger.warning("%s refused a cooperative launch (%s): backend 'step' runs", call.device.name, error)
            _refused.add(call.device.name)
            return False
    return True


def _constants(tiles: SequenceTiles, precision: str) -> dict[str, Any]:
    return dict(
        EXCHANGE=tiles.exchange, PRECISION=precision, BLOCK_B=tiles.block_b, BLOCK_H=tiles.block_h,
        BLOCK_K=tiles.block_k, NUM_K=tiles.num_k, SPLIT=tiles.split, PER_WAIT=tiles.per_wait,
    )  # fmt: skip


def specimens(problem: Problem, device: Device) -> list[Specimen]:
    """What a call would launch, by its types, with the launchers' own constants: for compiling."""
    found = []
    for kind in ("forward", "backward") if problem.training else ("forward",):
        tiles = sequence_tiles(
            kind, problem.batch, problem.hidden_size, problem.directions, problem.dtype, problem.precision, device
        )
        if isinstance(tiles, str):
            raise ValueError(tiles)
        found.append(specimen(kind, tiles, problem.dtype, problem.precision))
    return found


def specimen(kind: str, tiles: SequenceTiles, dtype: str, precision: str) -> Specimen:
    """The launch of one pass by its types. The caller's tensors may have any alignment: it makes no other kernel."""
    kernel = kernels.sequence_forward if kind == "forward" else kernels.sequence_backward
    scalars = kernels.FORWARD_SCALARS if kind == "forward" else kernels.BACKWARD_SCALARS
    own = f"*{dtype}"
    types = dict.fromkeys(scalars, "i32")
    types |= dict.fromkeys(("sizes_ptr", "starts_ptr", "status_ptr", "report_ptr"), "*i32")
    types |= {"e_ptr": "*i32" if dtype == "fp32" else "*i16"}
    types |= dict.fromkeys(("dh_n_ptr", "dh_0_ptr"), "*fp32")
    types |= {"state_ptr": "*fp32" if tiles.exchange or kind == "backward" else own}
    given = {name: types.get(name, own) for name in kernel.arg_names if name in types or name.endswith("_ptr")}
    return Specimen(
        kernel, given, _constants(tiles, precision), tiles.num_warps, num_stages=1, max_registers=tiles.max_registers
    )
