"""Launchers of kernels/study, the forms that `step` and `sequence` are compared with: modules with nn.GRU's parameters.

Inference of one dense layer of one direction. What a form does not serve is refused as a backend would refuse it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import tritongru
from tritongru.planning.devices import Device
from tritongru.planning.problem import BYTES
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.registry import DTYPES, device_of

from .cases import Case

if TYPE_CHECKING:
    from tritongru.launch.runtime import Specimen

BLOCK = 256  # elements of a program of the unfused form's kernel
VECTOR = 8  # units that H is a multiple of in the forms of one launch


@dataclass(frozen=True)
class SequenceForm:
    """A form of kernels/study/sequence.py, by what it does differently."""

    barrier: bool = False
    split: bool = True
    stacked: bool = False

    def tiles(self, B: int, H: int, dtype: str, precision: str, device: Device) -> SequenceTiles | str:
        """The tiles of `sequence` as this form takes them, or why it does not serve these sizes."""
        found = sequence_tiles("forward", B, H, 1, dtype, precision, device)
        if isinstance(found, str):
            return found
        if self.stacked:  # 64 rows of units for one warp group's instruction
            programs = -(-H // 16)
            found = dataclasses.replace(found, block_h=16, num_warps=4, programs=programs)
        if not found.exchange:
            return f"one program owns all units of H {H}: it exchanges nothing"
        if found.num_k > 1 or found.tiles > 1 or H % VECTOR:
            return f"it takes H a multiple of {VECTOR}, K in one chunk and a row tile a program, got H {H}, B {B}"
        groups = -(-B // found.block_b)
        if found.programs * groups > device.sms:
            return f"{found.programs * groups} programs are more than the {device.sms} SMs of {device.name}"
        return found

    def constants(self, tiles: SequenceTiles, precision: str) -> dict[str, Any]:
        return dict(
            BARRIER=self.barrier, SPLIT=tiles.num_warps if self.split else 1, STACKED=self.stacked,
            PRECISION=precision, BLOCK_B=tiles.block_b, BLOCK_H=tiles.block_h, BLOCK_K=tiles.block_k,
        )  # fmt: skip

    def specimen(self, tiles: SequenceTiles, dtype: str, precision: str) -> Specimen:
        """The launch by its types, for compiling."""
        from tritongru.kernels.study import sequence as kernels
        from tritongru.launch.runtime import Specimen

        bits = "*i32" if dtype == "fp32" else "*i16"
        types = dict.fromkeys(kernels.SCALARS, "i32") | dict.fromkeys(
            ("x_ptr", "y_ptr", "h_0_ptr", "w_ptr", "b_ptr"), f"*{dtype}"
        )
        types |= {} if self.barrier else {"y_ptr": bits}
        types |= dict.fromkeys(("counter_ptr", "status_ptr", "report_ptr"), "*i32")
        return Specimen(
            kernels.study_forward, types, self.constants(tiles, precision), tiles.num_warps, num_stages=1,
            max_registers=tiles.max_registers,
        )  # fmt: skip


SEQUENCE = {
    "sequence-barrier": SequenceForm(barrier=True),
    "sequence-repeated": SequenceForm(split=False),
    "sequence-stacked": SequenceForm(split=False, stacked=True),
    "sequence-split": SequenceForm(),
}


ABOUT = {
    "unfused": "a library product and a pointwise kernel for each step",
    "step-input": "step with the input's product in it, cell by cell",
    "sequence-barrier": "one launch, a counter for each step",
    "sequence-repeated": "one launch, the product whole in every warp",
    "sequence-stacked": "one launch, the gates' weights as one factor",
    "sequence-split": "one launch, K split over the warps: the others' yardstick",
}


def module(name: str, case: Case, **place: Any) -> nn.Module:
    """A form by its name in ABOUT."""
    if name == "step-input":
        return StepWithInput(case.I, case.H, **place)
    return StudyForm(case.I, case.H, name=name, **place)


def unserved(case: Case) -> str | None:
    """Why no form takes a case."""
    if case.layers > 1 or case.bidirectional or case.packed or case.cell:
        return "it takes one dense layer of one direction"
    return None


class StudyForm(nn.GRU):
    """nn.GRU's parameters, and the forward pass of the form `name`."""

    def __init__(self, *sizes: int, name: str, **options: Any):
        super().__init__(*sizes, **options)
        self.name = name

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        """input [T, B, I], hx [1, B, H]: output [T, B, H] and h_n [1, B, H].

        Raises:
            RuntimeError: gradients are wanted, or the form does not serve these sizes.
        """
        from tritongru.launch.products import products, project, rnn_precision

        if torch.is_grad_enabled():
            raise RuntimeError(f"backend {self.name!r} cannot run here: it has no backward")
        w_ih, w_hh, b_ih, b_hh = (weight.contiguous() for weight in self.all_weights[0])
        precision = rnn_precision(device_of(input.device).vendor == "nvidia")
        with products(input, precision):
            x_proj = project(input.contiguous(), (w_ih,), (b_ih,))
            run = partial(_sequence, SEQUENCE[self.name], self.name) if self.name in SEQUENCE else _unfused
            y = run(x_proj, hx[0].contiguous(), w_hh, b_hh, precision)
        return y, y[-1:].clone()


def _unfused(x_proj: Tensor, h_0: Tensor, w_hh: Tensor, b_hh: Tensor, precision: str) -> Tensor:
    """A library product and a launch of kernels/study/unfused.py for each timestep."""
    from tritongru.kernels.study import unfused as kernels
    from tritongru.launch.interpreter import repair
    from tritongru.launch.runtime import Launch, empty, interpreted

    if interpreted(kernels.unfused_forward):
        repair()
    T, B, gates = x_proj.shape
    H = gates // 3
    dtype, device = x_proj.dtype, x_proj.device
    a = empty(B, gates, dtype=dtype, device=device)
    y = empty(T, B, H, dtype=dtype, device=device)
    state = h_0.to(torch.float32, copy=True)
    arguments = dict(a_ptr=a, x_ptr=x_proj, b_ptr=b_hh, state_ptr=state, y_ptr=y, H=H, BLOCK=BLOCK)
    launch = Launch(kernels.unfused_forward, kernels.SCALARS, arguments, num_warps=4, num_stages=1)
    h_prev, w_t = h_0, w_hh.t()
    for t in range(T):
        torch.mm(h_prev, w_t, out=a)
        launch((-(-B * H // BLOCK), 1, 1), (t * B, B))
        h_prev = y[t]
    return y


def unfused_specimen(H: int, dtype: str) -> Specimen:
    """The pointwise launch by its types, for compiling."""
    from tritongru.kernels.study import unfused as kernels
    from tritongru.launch.runtime import Specimen

    types = dict.fromkeys(kernels.SCALARS, "i32") | dict.fromkeys(("a_ptr", "x_ptr", "b_ptr", "y_ptr"), f"*{dtype}")
    return Specimen(kernels.unfused_forward, types | {"state_ptr": "*fp32"}, {"H": H, "BLOCK": BLOCK}, 4, 1)


def _sequence(
    form: SequenceForm, name: str, x_proj: Tensor, h_0: Tensor, w_hh: Tensor, b_hh: Tensor, precision: str
) -> Tensor:
    """One launch of kernels/study/sequence.py; around it W_hh padded, and the fill of the counters or of y."""
    from tritongru.kernels.study import sequence as kernels
    from tritongru.launch import exchange as launcher
    from tritongru.launch.interpreter import repair
    from tritongru.launch.runtime import Launch, empty, interpreted

    T, B, gates = x_proj.shape
    H, dtype, device = gates // 3, x_proj.dtype, x_proj.device
    tiles = form.tiles(B, H, DTYPES[dtype], precision, device_of(device))
    if isinstance(tiles, str):
        raise RuntimeError(f"backend {name!r} cannot run here: {tiles}")
    if interpreted(kernels.study_forward):
        repair()
    found = launcher.status(device)
    found.check()
    found.seconds = launcher.wait_seconds()
    U, K, groups = tiles.programs * tiles.block_h, tiles.block_k, -(-B // tiles.block_b)
    w = torch.nn.functional.pad(w_hh.view(3, H, H), (0, K - H, 0, U - H)).clone()
    y = empty(T, B, H, dtype=dtype, device=device)
    bits = y.view(torch.int32 if dtype == torch.float32 else torch.int16)
    counters = torch.zeros(T if form.barrier else 1, groups, dtype=torch.int32, device=device)
    if not form.barrier:
        bits.fill_(launcher.SENTINEL)
    arguments = dict(
        x_ptr=x_proj, y_ptr=y if form.barrier else bits, h_0_ptr=h_0.clone(), w_ptr=w, b_ptr=b_hh.clone(),
        counter_ptr=counters, status_ptr=found.word, report_ptr=found.report, **form.constants(tiles, precision),
    )  # fmt: skip
    launch = Launch(
        kernels.study_forward, kernels.SCALARS, arguments, tiles.num_warps, num_stages=1, cooperative=True,
        max_registers=tiles.max_registers,
    )  # fmt: skip
    launch((tiles.programs, groups, 1), (T, B, H // VECTOR, int(1e6 * found.seconds)))
    return y


class StepWithInput(nn.GRU):
    """A launch of kernels/step.py for each timestep with x_t W_i^T in it: a loop over cells."""

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        h, hs = hx[0], []
        for x in input:
            h = tritongru.gru_cell(x, h, *self.all_weights[0], backend="step")
            hs.append(h)
        return torch.stack(hs), h[None]


def read_by_a_step(tiles: SequenceTiles, B: int, H: int, dtype: str) -> int:
    """Bytes that all programs of a form of `sequence` load in a step: h, once a program, and x_proj."""
    rows = -(-B // tiles.block_b) * tiles.block_b
    return BYTES[dtype] * (tiles.programs * rows * H + B * 3 * H)
