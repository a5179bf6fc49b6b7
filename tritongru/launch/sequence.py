"""Launcher of kernels/sequence.py and small.py: one launch per sequence, each way. Where programs exchange, several if
the buffer would grow too large (over time), the programs do not all fit (over rows), or both directions do not; around
them a padded copy of W_hh (backward: W_hh^T) and the fill of the buffer. Library products are tritongru/products.py.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import exchange
from ..kernels import sequence as kernels
from ..parts import part
from ..planning.sequence import SequenceTiles, exchanges, kinds, sequence_tiles
from ..planning.small import SmallTiles
from ..products import project
from ..status import Status, status, wait_seconds
from . import small, step
from .exchange import Buffer, Shape
from .protocol import LayerCall, LayerWeights, SavedGates, rzn_strides
from .runtime import Grid, Kernel, Launch, Steps, empty, interpreting, once_more, one_step

logger = logging.getLogger("tritongru")


def forward(
    call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights, h_n: Tensor | None = None
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """As protocol.py's Launcher has it."""
    once = settled("forward", call)
    if once is None:
        return step.forward(dataclasses.replace(call, overrides=()), x, h_0, weights, h_n)  # of tiles with other fields
    visits, D, H, device_status = call.visits, call.directions, call.hidden_size, status(x.device)
    device_status.check()
    by_row, new = x.shape[:-1], partial(empty, dtype=x.dtype, device=x.device)
    rzn = project(x, weights.w_ih, weights.b_ih).view(*by_row, D, 3 * H)
    q = new(*by_row, D, H) if call.save_gates else None
    y = visits.padded(new(*by_row, D * H))
    h_n = new(D, visits.batch, H) if h_n is None else h_n
    gates = None if q is None else SavedGates(rzn, q)
    tensors = [rzn, y, h_0, h_n, *weights.w_hh, *weights.b_hh, device_status.word, *(gates or ())[1:]]
    if once.buffer is None and call.again("small forward", tensors):
        return y, h_n, gates
    h_0 = h_0.resolve_neg().contiguous()  # a kernel reads memory, not what is lazily negated
    b_hh = weights.b_hh or weights.w_hh  # not read where there are none
    arguments = dict(
        rzn_ptr=rzn, q_ptr=y if q is None else q, y_ptr=y, h_0_ptr=h_0, h_n_ptr=h_n, b_ptr=b_hh[0],
        b_reverse_ptr=b_hh[-1], **rzn_strides(rzn), save_gates=int(call.save_gates), has_bias=int(bool(weights.b_hh)),
    )  # fmt: skip
    try:
        for launch, steps in _launches(once, call, weights, arguments, device_status):
            launch(steps)
    except RuntimeError as refusal:
        _note_refusal(refusal, call, once)
        return forward(call, x, h_0, weights, h_n)
    if once.buffer is None and visits.plain:
        call.was_launched("small forward", lambda: once_more(tensors, [(launch, steps, None)]))
    return y, h_n, gates


def backward(
    call: LayerCall, dy: Tensor, dh_n: Tensor, y: Tensor, h_0: Tensor, gates: SavedGates, weights: LayerWeights,
    dh_0_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As protocol.py's Launcher has it."""
    once = settled("backward", call)
    if once is None:
        by_step = dataclasses.replace(call, overrides=())
        return step.backward(by_step, dy, dh_n, y, h_0, gates, weights, dh_0_dtype)
    visits, D, H, device_status = call.visits, call.directions, call.hidden_size, status(y.device)
    device_status.check()
    N = visits.size_rows
    dgates = visits.padded(empty(D, N, 4 * H, dtype=y.dtype, device=y.device))
    dh_0 = empty(D, visits.batch, H, dtype=torch.float32, device=y.device)
    dh = dh_n.resolve_neg().to(torch.float32).contiguous()  # as dh_0 in float32 always: one kernel, in chunks too
    tensors = [dy, y, h_0, *gates, dh, dgates, dh_0, *weights.w_hh, device_status.word]
    # Hooks on saved tensors may have changed how they lie.
    laid_out = [(t.stride(), t.dtype) for t in tensors[:5]] if once.buffer is None else ()
    kind = "small backward", dh_0_dtype is not None, dy.is_neg(), *laid_out
    if once.buffer is None and call.again(kind, tensors):
        return dgates, dh_0.to(dh_0_dtype) if dh_0_dtype else None
    dy, h_0 = dy.resolve_neg(), h_0.resolve_neg().contiguous()
    y, (rzn, q) = y.contiguous(), gates.laid_out()
    if isinstance(once.tiles, SmallTiles):
        dy, y, rzn, q = [small.as_read(tensor, once.tiles.vector) for tensor in (dy, y, rzn, q)]
    strides = dy.stride()
    arguments = dict(
        dy_ptr=dy, dh_n_ptr=dh, rzn_ptr=rzn, q_ptr=q, y_ptr=y, h_0_ptr=h_0, dgates_ptr=dgates, dh_0_ptr=dh_0,
        **rzn_strides(rzn), size_rows=N, stride_dy_t=strides[0], stride_dy_b=strides[-2], stride_dy_h=strides[-1],
        want_dh=int(dh_0_dtype is not None),
    )  # fmt: skip
    try:
        for launch, steps in _launches(once, call, weights, arguments, device_status):
            launch(steps)
    except RuntimeError as refusal:
        _note_refusal(refusal, call, once)
        return backward(call, dy, dh_n, y, h_0, gates, weights, dh_0_dtype)
    if once.buffer is None and visits.plain:  # a launch with nothing around it: the next one hands over addresses
        call.was_launched(kind, lambda: once_more(tensors, [(launch, steps, None)]))
    return dgates, dh_0.to(dh_0_dtype) if dh_0_dtype else None


def product_precision(call: LayerCall, backward: bool = True) -> str | None:
    """Around a small layer by FMA, as its own products are (kernels/small.py), whatever the switch says."""
    return call.precision if exchanges(call.recurrence) else "ieee"


class Settled(NamedTuple):
    """What of a pass is the same in every call of its kind."""

    tiles: SequenceTiles | SmallTiles
    kernel: Kernel
    grid: Grid
    scalars: dict[str, int]
    visits_per_launch: int = 0  # of a packed batch they follow from its rows
    buffer: Shape | None = None


def settled(kind: str, call: LayerCall) -> Settled | None:
    """Of "forward" or "backward"; None where `step` has to serve it: the driver refuses what the plan counts on.

    Raises:
        RuntimeError: the device cannot hold the weights.
    """
    once: Settled | None = call.settled.get(kind)
    if once is None:
        v, H, D, packed = call.visits, call.hidden_size, call.directions, call.visits.batch_sizes is not None
        tiles = sequence_tiles(kind, call.recurrence)
        if isinstance(tiles, str):
            raise RuntimeError(f"backend 'sequence' cannot run here: {tiles}; backend 'step' can")
        scalars = dict(
            T=v.time, B=v.batch, H=H, D=D, stride_row=v.stride_row, packed=int(packed),
            has_lengths=int(packed or v.lengths is not None),
        )  # fmt: skip
        kernel = kernel_of(kind, tiles, call.dtype, call.precision, v.resets is not None)
        once = Settled(tiles, kernel, tiles.grid, scalars)
        if isinstance(tiles, SequenceTiles):
            visits = 0 if packed else tiles.visits_per_launch(kind, call.recurrence, v.time, v.size_rows)
            width, rows, gates = _bits(call.dtype), tiles.block_b, 1 if kind == "forward" else 3
            of_block, of_unit = exchange.units_of_block(width, rows), exchange.BLOCK_BYTES * 8 // width
            sizes = tiles.directions, tiles.groups, tiles.tiles, gates, rows // exchange.rows_of_block(rows)
            shape = Shape((*sizes, tiles.units // of_block, of_unit), tiles.programs * tiles.block_h // of_block)
            once = once._replace(visits_per_launch=visits, buffer=shape)
        call.settled[kind] = once
    return None if once.kernel.cooperative and call.device.name in _refused else once


_refused: set[str] = set()  # names of devices whose driver refused a cooperative launch in this process


def _note_refusal(error: RuntimeError, call: LayerCall, once: Settled) -> None:
    """Of the driver; any other error is raised again."""
    if not once.kernel.cooperative or not any(word in str(error).lower() for word in ("cooperative", "not supported")):
        raise error
    logger.warning("%s refused a cooperative launch (%s): backend 'step' runs", call.device.name, error)
    _refused.add(call.device.name)


def _launches(
    once: Settled, call: LayerCall, weights: LayerWeights, arguments: dict[str, Any], device_status: Status
) -> Iterator[tuple[Launch, Steps]]:
    """Those of a pass, in their order: each is to be made before the next is asked for. arguments: by name."""
    tiles, kernel, visits, backward = once.tiles, once.kernel, call.visits, "dgates_ptr" in arguments
    device, dtype = arguments["rzn_ptr"].device, arguments["rzn_ptr"].dtype
    arguments |= once.scalars
    arguments |= visits.pointers(device_status.word)
    rows, scalars = visits.time * visits.batch, kernel.signature.scalars
    if isinstance(tiles, SmallTiles):
        arguments |= dict(w_ptr=weights.w_hh[0], w_reverse_ptr=weights.w_hh[-1])
        yield kernel.launch(arguments, rows=rows), one_step(once.grid, scalars(arguments))
        return
    device_status.seconds = wait_seconds()
    T, D, kind = visits.time, call.directions, "backward" if backward else "forward"
    steps = once.visits_per_launch or tiles.visits_per_launch(kind, call.recurrence, T, visits.size_rows)
    w, w_reverse = _padded(weights.w_hh, tiles, transpose=backward)
    arguments |= dict(
        w_ptr=w, w_reverse_ptr=w_reverse, status_ptr=device_status.word, report_ptr=device_status.report,
        bound=exchange.bound_of(device_status.seconds),
    )  # fmt: skip
    if not backward:
        sizes = D, visits.batch, call.hidden_size
        arguments["state_ptr"] = (
            empty(*sizes, dtype=torch.float32, device=device).view(torch.int32) if steps < T else device_status.word
        )
    assert once.buffer is not None
    buffer = Buffer(once.buffer, steps + 1, dtype, device)
    first_dh, want_dh = arguments.get("dh_n_ptr"), arguments.get("want_dh", 0)
    firsts = range(0, T, steps)
    for first_visit in reversed(firsts) if backward else firsts:
        stop = min(first_visit + steps, T)
        arguments |= dict(first_visit=first_visit, stop_visit=stop)
        if backward:  # from one launch to the next dh goes by dh_0
            arguments["want_dh"] = int(first_visit > 0 or want_dh)
            arguments["dh_n_ptr"] = first_dh if stop == T else arguments["dh_0_ptr"]
        for first_row in range(0, visits.batch, tiles.rows):
            for direction in range(0, D, tiles.directions):
                arguments |= dict(first_row=first_row, first_direction=direction)
                arguments["e_ptr"] = buffer.filled(stop - first_visit + 1)
                yield kernel.launch(arguments, rows=rows), one_step(once.grid, scalars(arguments))


@part("weights")
def _padded(w_hh: Sequence[Tensor], tiles: SequenceTiles, transpose: bool) -> tuple[Tensor, Tensor]:
    """W_hh of the first direction and the last as [3, U, K], each gate's transposed if asked for, padded with zeros and
    aligned; itself where it is so already."""
    H, U, K, found = w_hh[0].shape[-1], tiles.programs * tiles.block_h, tiles.units, []
    for of_direction in w_hh:
        w = of_direction.view(3, H, H)
        w = w.transpose(1, 2) if transpose else w
        w = w.contiguous() if (U, K) == (H, H) else torch.nn.functional.pad(w, (0, K - H, 0, U - H))
        found.append(w.clone() if w.data_ptr() % 16 else w)
    return found[0], found[-1]


def kernel_of(kind: str, tiles: SequenceTiles | SmallTiles, dtype: str, precision: str, resets: bool = False) -> Kernel:
    """The kernel of one pass, with its constants."""
    if isinstance(tiles, SmallTiles):
        return small.kernel_of(kind, tiles, resets)
    kernel = kernels.sequence_forward if kind == "forward" else kernels.sequence_backward
    constants, waits = _constants(kind, tiles, dtype, precision, resets)
    if interpreting():
        from ..tools.emulator import twins

        for wait in waits:
            twins.register(wait)
    return Kernel(kernel, constants, tiles.num_warps, cooperative=True, max_registers=tiles.max_registers)


@lru_cache(maxsize=256)
def _constants(
    kind: str, tiles: SequenceTiles, dtype: str, precision: str, resets: bool
) -> tuple[dict[str, Any], list[Any]]:
    """Of a kernel, and the waits whose text it has."""
    gates, width = 3 if kind == "backward" and tiles.waits == 1 else 1, _bits(dtype)
    sizes = tiles.block_b, tiles.block_k, tiles.num_k, gates, tiles.num_warps, width
    wait, wait_next = (exchange.wait_text(*sizes, delay) for delay in (tiles.delay, 0))
    constants = dict(
        RESETS=resets, PRECISION=precision if dtype == "fp32" else "tf32", ROWS=tiles.block_b, TILES=tiles.tiles,
        UNITS=tiles.block_h, PARTS=tiles.num_k, PART=tiles.block_k, WARPS=tiles.num_warps, SHARED=tiles.shared_gates,
        WAIT=wait.text, CONSTRAINTS=wait.constraints, PACK=wait.pack,
    )  # fmt: skip
    if kind == "backward":
        constants |= dict(WAITS=tiles.waits, WAIT_NEXT=wait_next.text)
    return constants, [wait, wait_next]


def _bits(dtype: str) -> int:
    """Of an element of the exchange."""
    return 32 if dtype == "fp32" else 16


def specimens(call: LayerCall, input_size: int, bias: bool, recompute: bool, aligned: bool = True) -> list[Kernel]:
    """As protocol.py's Launcher has it. How the caller's tensors are aligned makes no other kernel."""
    resets, found = call.visits.resets is not None, []
    for kind in kinds(call.visits.time, call.save_gates):
        if isinstance(tiles := sequence_tiles(kind, call.recurrence), str):
            raise ValueError(tiles)
        found.append(specimen(kind, tiles, call.dtype, call.precision, resets))
    return found


def specimen(kind: str, tiles: SequenceTiles | SmallTiles, dtype: str, precision: str, resets: bool = False) -> Kernel:
    """The launch of one pass by its types."""
    integers = ("state_ptr", "lengths_ptr", "starts_ptr", "status_ptr", "report_ptr")
    types = dict.fromkeys(integers, "*i32") | dict.fromkeys(("dh_n_ptr", "dh_0_ptr"), "*fp32")
    types |= {"e_ptr": "*i32" if dtype == "fp32" else "*i16", "resets_ptr": "*i8"}
    return kernel_of(kind, tiles, dtype, precision, resets).of_types(types, f"*{dtype}")
