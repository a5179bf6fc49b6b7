"""Launcher of kernels/sequence.py: one launch per sequence, each way, and more of them where the exchange buffer would
grow too large (over time), the programs do not all fit (over rows), or both directions do not fit at once. Layers that
one program holds go to launch/small.py.

forward    sequence_forward; around it the product x_proj, a padded copy of W_hh, the fill of the exchange buffer
backward   sequence_backward; around it a padded copy of W_hh^T, the fill; the library products over all T are
           tritongru/products.py
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..parts import part
from ..planning.devices import Device
from ..planning.problem import Problem
from ..planning.sequence import Overrides, SequenceTiles, sequence_tiles
from ..planning.small import SmallTiles
from ..products import project
from . import step
from .exchange import Buffer, check_all, status, wait_seconds
from .protocol import LayerCall, LayerWeights, SavedGates, rzn_strides
from .runtime import Launch, Specimen, empty, interpreted
from .weights import padded_weights

try:  # Gluon is young: an older Triton lacks it, or what the kernels use of it
    from ..kernels import exchange
    from ..kernels import sequence as kernels
    from . import small
except (ImportError, AttributeError) as error:
    _lacks: str | None = str(error)
else:
    _lacks = None

__all__ = ["backward", "check_all", "forward", "overridden", "specimen", "specimens"]

logger = logging.getLogger("tritongru")

LARGEST = 1 << 31  # of what the kernels count in 32 bits: elements of a time step


def overridden(overrides: Overrides) -> SimpleNamespace:
    """This backend with fields of its tiles set."""
    return SimpleNamespace(
        __name__=f"{__name__}:{overrides}", forward=partial(forward, overrides=overrides),
        backward=partial(backward, overrides=overrides), specimens=partial(specimens, overrides=overrides),
    )  # fmt: skip


@part("recurrence")
def forward(
    call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights, overrides: Overrides = ()
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """As launch/step.py's forward."""
    tiles = _tiles("forward", call, overrides)
    if tiles is None:
        return step.forward(call, x, h_0, weights)
    x, h_0 = x.resolve_neg(), h_0.resolve_neg().contiguous()  # a kernel reads memory, not what is lazily negated
    if isinstance(tiles, SmallTiles):
        return small.forward(call, tiles, x, h_0, weights)
    D, H, B = call.directions, call.hidden_size, call.visits.batch
    device, dtype = x.device, x.dtype
    by_row = x.shape[:-1]
    rzn = project(x, weights.w_ih, weights.b_ih).view(*by_row, D, 3 * H)
    q = empty(*by_row, D, H, dtype=dtype, device=device) if call.save_gates else None
    y = call.visits.padded(empty(*by_row, D * H, dtype=dtype, device=device))
    h_n = empty(D, B, H, dtype=dtype, device=device)
    several = _visits_per_launch("forward", call, tiles) < call.visits.time
    state = empty(D, B, H, dtype=torch.float32, device=device).view(torch.int32) if several else status(device).word
    first, last = weights.direction(0), weights.direction(-1)
    arguments = dict(
        rzn_ptr=rzn, q_ptr=y if q is None else q, y_ptr=y, h_0_ptr=h_0, h_n_ptr=h_n, state_ptr=state,
        b_ptr=first.b_hh, b_reverse_ptr=last.b_hh, **padded_weights(weights, tiles, transpose=False),
    )  # fmt: skip
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    scalars = dict(
        stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b, save_gates=int(call.save_gates),
        has_bias=int(bool(weights.b_hh)),
    )  # fmt: skip
    if not _launch("forward", call, tiles, arguments, scalars):
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
    overrides: Overrides = (),
) -> tuple[Tensor, Tensor | None]:
    """As launch/step.py's backward."""
    tiles = _tiles("backward", call, overrides)
    if tiles is None:
        return step.backward(call, dy, dh_n, y, h_0, gates, weights, dh_0_dtype)
    dy, h_0 = dy.resolve_neg(), h_0.resolve_neg().contiguous()
    y, gates = y.contiguous(), gates.laid_out()  # as forward made them, unless a hook on saved tensors re-laid them
    dh = dh_n.resolve_neg().to(torch.float32).contiguous()  # as dh_0 in float32 always: one kernel, in chunks too
    if isinstance(tiles, SmallTiles):
        return small.backward(call, tiles, dy, dh, y, h_0, gates, weights, dh_0_dtype)
    visits, D, H = call.visits, call.directions, call.hidden_size
    rzn, q = gates
    dgates = visits.padded(empty(D, visits.size_rows, 4 * H, dtype=y.dtype, device=y.device))
    dh_0 = empty(D, visits.batch, H, dtype=torch.float32, device=y.device)
    arguments = dict(
        dy_ptr=dy, dh_n_ptr=dh, rzn_ptr=rzn, q_ptr=q, y_ptr=y, h_0_ptr=h_0, dgates_ptr=dgates, dh_0_ptr=dh_0,
        **padded_weights(weights, tiles, transpose=True),
    )  # fmt: skip
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    scalars = dict(
        stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b, size_rows=visits.size_rows, stride_dy_t=dy.stride(0),
        stride_dy_b=dy.stride(-2), stride_dy_h=dy.stride(-1), want_dh=int(dh_0_dtype is not None),
    )  # fmt: skip
    if not _launch("backward", call, tiles, arguments, scalars):
        return step.backward(call, dy, dh_n, y, h_0, gates, weights, dh_0_dtype)
    return dgates, dh_0.to(dh_0_dtype) if dh_0_dtype else None


_refused: set[str] = set()  # names of devices whose driver refused a cooperative launch in this process


def _tiles(kind: str, call: LayerCall, overrides: Overrides) -> SequenceTiles | SmallTiles | None:
    """The tiles of a pass; None where `step` has to serve it, because the Triton that is installed lacks Gluon, or the
    driver refuses what the plan counts on.

    Raises:
        RuntimeError: the device cannot hold the weights.
    """
    visits = call.visits
    tiles = sequence_tiles(
        kind, visits.batch, call.hidden_size, call.directions, call.dtype, call.precision, call.device, overrides
    )
    if isinstance(tiles, str):
        raise RuntimeError(f"backend 'sequence' cannot run here: {tiles}; backend 'step' can")
    if _lacks is not None:
        return _step_instead(f"the installed Triton lacks what its kernels need ({_lacks})")
    if 4 * call.directions * visits.batch * call.hidden_size >= LARGEST:
        return _step_instead(f"a time step of {visits.batch} rows has more elements than its kernels count")
    return None if isinstance(tiles, SequenceTiles) and call.device.name in _refused else tiles


@cache
def _step_instead(why: str) -> None:
    logger.warning("backend 'sequence' cannot run: %s; 'step' runs", why)


def _visits_per_launch(kind: str, call: LayerCall, tiles: SequenceTiles) -> int:
    v = call.visits
    return tiles.visits_per_launch(kind, call.dtype, v.time, v.size_rows, call.hidden_size, call.directions)


def _launch(
    kind: str, call: LayerCall, tiles: SequenceTiles, arguments: Mapping[str, Any], scalars: Mapping[str, int]
) -> bool:
    """The launches of a pass; False where the driver refuses."""
    visits, dtype, device = call.visits, arguments["rzn_ptr"].dtype, arguments["rzn_ptr"].device
    kernel, names = _kernel(kind)
    found = status(device)
    found.check()
    found.seconds = wait_seconds()
    T, steps = visits.time, _visits_per_launch(kind, call, tiles)
    lengths, starts = visits.lengths_and_starts(device)
    packed = visits.batch_sizes is not None
    scalars = dict(
        T=T, B=visits.batch, H=call.hidden_size, D=call.directions, stride_row=visits.stride_row, packed=int(packed),
        has_lengths=int(packed or visits.lengths is not None), bound=exchange.bound_of(found.seconds), **scalars,
    )  # fmt: skip
    wait = _wait(kind, tiles, call.dtype)
    if interpreted(kernel):
        from ..tools.emulator import twins  # the emulator, which nobody else needs

        for each in (wait, _wait(kind, dataclasses.replace(tiles, delay=0), call.dtype)):
            twins.register(each)
    of_block, tall = exchange.units_of_block(wait.width, tiles.block_b), exchange.rows_of_block(tiles.block_b)
    blocks, owned = tiles.units // of_block, tiles.programs * tiles.block_h // of_block
    gates = 1 if kind == "forward" else 3
    block = exchange.BLOCK_BYTES * 8 // wait.width
    buffer = Buffer(
        (tiles.directions, tiles.groups, tiles.tiles, gates, tiles.block_b // tall, blocks, block), steps + 1, owned,
        dtype, device,
    )  # fmt: skip
    words = dict(
        lengths_ptr=lengths, starts_ptr=starts, status_ptr=found.word, report_ptr=found.report,
        resets_ptr=(lengths if visits.resets is None else visits.resets).view(torch.int8),
    )  # fmt: skip
    firsts = range(0, T, steps) if kind == "forward" else reversed(range(0, T, steps))
    for first_visit in firsts:
        stop = min(first_visit + steps, T)
        given = {**scalars, "first_visit": first_visit, "stop_visit": stop}
        pointers = {**arguments, **words}
        if kind == "backward":
            given["want_dh"] = int(first_visit > 0 or scalars["want_dh"])
            if stop < T:
                pointers["dh_n_ptr"] = arguments["dh_0_ptr"]
        for first_row in range(0, visits.batch, tiles.rows):
            for direction in range(0, call.directions, tiles.directions):
                pointers["e_ptr"] = buffer.filled(stop - first_visit + 1)
                launch = Launch(
                    kernel, names,
                    {**pointers, **_constants(kind, tiles, call.dtype, call.precision, visits.resets is not None)},
                    tiles.num_warps, num_stages=1, cooperative=True, max_registers=tiles.max_registers,
                )  # fmt: skip
                values = {**given, "first_row": first_row, "first_direction": direction}
                try:
                    launch(tiles.grid, [values[name] for name in names])
                except RuntimeError as error:
                    if not any(word in str(error).lower() for word in ("cooperative", "not supported")):
                        raise
                    logger.warning("%s refused a cooperative launch (%s): backend 'step' runs", call.device.name, error)
                    _refused.add(call.device.name)
                    return False
    return True


def _kernel(kind: str) -> tuple[Any, tuple[str, ...]]:
    if kind == "forward":
        return kernels.sequence_forward, kernels.FORWARD_SCALARS
    return kernels.sequence_backward, kernels.BACKWARD_SCALARS


@lru_cache(maxsize=256)
def _wait(kind: str, tiles: SequenceTiles, dtype: str) -> Any:
    gates = 3 if kind == "backward" and tiles.waits == 1 else 1
    width = 32 if dtype == "fp32" else 16
    return exchange.wait_text(
        tiles.block_b, tiles.block_k, tiles.num_k, gates, tiles.num_warps, width, tiles.delay, bool(tiles.early)
    )


def _constants(kind: str, tiles: SequenceTiles, dtype: str, precision: str, resets: bool = False) -> dict[str, Any]:
    wait = _wait(kind, tiles, dtype)
    ask, ask_constraints = exchange.ask_text(wait) if wait.asked else ("", "")
    found = dict(
        RESETS=resets,
        PRECISION=precision if dtype == "fp32" else "tf32", ROWS=tiles.block_b, TILES=tiles.tiles, UNITS=tiles.block_h,
        PARTS=tiles.num_k, PART=tiles.block_k, WARPS=tiles.num_warps, SHARED=tiles.shared_gates, ASK=ask,
        ASK_CONSTRAINTS=ask_constraints, WAIT=wait.text,
        CONSTRAINTS=wait.constraints, PACK=wait.pack,
    )  # fmt: skip
    if kind == "forward":
        return found
    return {**found, "WAITS": tiles.waits, "WAIT_NEXT": _wait(kind, dataclasses.replace(tiles, delay=0), dtype).text}


def specimens(problem: Problem, device: Device, aligned: bool = True, overrides: Overrides = ()) -> list[Specimen]:
    """What a call would launch, by its types, with the launchers' own constants: for compiling.

    How the caller's tensors are aligned makes no other kernel.
    """
    found = []
    for kind in ("forward", "backward") if problem.training else ("forward",):
        tiles = sequence_tiles(
            kind, problem.batch, problem.hidden_size, problem.directions, problem.dtype, problem.precision, device,
            overrides,
        )  # fmt: skip
        if isinstance(tiles, str):
            raise ValueError(tiles)
        found.append(specimen(kind, tiles, problem.dtype, problem.precision))
    return found


def specimen(
    kind: str, tiles: SequenceTiles | SmallTiles, dtype: str, precision: str, resets: bool = False
) -> Specimen:
    """The launch of one pass by its types. The caller's tensors may have any alignment: it makes no other kernel."""
    if isinstance(tiles, SmallTiles):
        return small.specimen(kind, tiles, dtype, resets)
    kernel, scalars = _kernel(kind)
    own = f"*{dtype}"
    types = dict.fromkeys(scalars, "i32")
    types |= dict.fromkeys(("state_ptr", "lengths_ptr", "starts_ptr", "status_ptr", "report_ptr"), "*i32")
    types |= {"e_ptr": "*i32" if dtype == "fp32" else "*i16", "resets_ptr": "*i8"}
    types |= dict.fromkeys(("dh_n_ptr", "dh_0_ptr"), "*fp32")
    given = {name: types.get(name, own) for name in kernel.arg_names if name in types or name.endswith("_ptr")}
    return Specimen(
        kernel, given, _constants(kind, tiles, dtype, precision, resets), tiles.num_warps, num_stages=1,
        max_registers=tiles.max_registers, cooperative=True,
    )  # fmt: skip
