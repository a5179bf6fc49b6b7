"""The layer on a CUDA device: half precision and TF32, launches, devices, streams, graphs. `make gpu` runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import tritongru
from tests.kit.cases import EXCHANGING_CASES, HALF, LARGE_CASES, MORE_CASES, SMALL_CASES
from tests.kit.gpu import BESIDE, CUDA, drawn, layer_of, needs_pdl, on_a_side_stream
from tests.kit.inside import fewer_programs, launches_without_pdl
from tests.kit.modules import results, same_bits
from tests.kit.rule import assert_right
from tritongru.launch.runtime import observe
from tritongru.planning.choose import off_chip
from tritongru.planning.devices import of_cuda
from tritongru.products import rnn_precision
from tritongru.registry import DTYPES
from tritongru.tools.check import CASES, Case, measure

pytestmark = pytest.mark.gpu

ALL_CASES = CASES + MORE_CASES + LARGE_CASES


def refused(B: int, H: int, D: int, dtype: torch.dtype) -> str | None:
    """Why the chip does not hold a layer."""
    precision = rnn_precision(nvidia=torch.version.hip is None)
    return off_chip(B, H, D, DTYPES[dtype], precision, True, of_cuda(CUDA.index))


@pytest.fixture(autouse=True)
def no_wait_runs_out() -> Iterator[None]:
    yield
    tritongru.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["reference", "step"])
def test_rule(case: Case, backend: str, dtype: torch.dtype) -> None:
    assert_right(case, backend, dtype, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", ALL_CASES + EXCHANGING_CASES + SMALL_CASES, ids=lambda case: case.name)
def test_rule_of_sequence(case: Case, dtype: torch.dtype) -> None:
    _, B, D = case.sizes
    if why_not := refused(B, case.H, D, dtype):
        pytest.skip(why_not)
    assert_right(case, "sequence", dtype, CUDA)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_largest_layer_that_fits(dtype: torch.dtype) -> None:
    """All SMs of the device, and nearly all their shared memory."""
    H = max((H for H in range(64, 2112, 64) if refused(8, H, 1, dtype) is None), default=0)
    if not H:
        pytest.skip("the device holds no layer on chip")
    assert_right(Case(T=6, B=8, I=32, H=H), "sequence", dtype, CUDA)


@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.name)
def test_ieee_float32(case: Case, monkeypatch) -> None:
    """With TF32 switched off the error is float32's, as nn.GRU's is."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    figures = measure(case, "step", torch.float32, CUDA)
    worst = max(figures.items(), key=lambda item: item[1].error)
    assert worst[1].error < 1e-5, worst


# Which path runs, by which launches.


def as_torch_s(layer: Any) -> torch.nn.GRU:
    theirs = torch.nn.GRU(layer.input_size, layer.hidden_size, device=CUDA, dtype=layer.weight_hh_l0.dtype)
    theirs.load_state_dict(layer.state_dict())
    return theirs


@contextmanager
def launched() -> Iterator[list[str]]:
    names: list[str] = []
    with observe(lambda name, grid: names.append(name)):
        yield names


def test_sequence_takes_one_launch_each_way() -> None:
    layer = layer_of("sequence", 8, 256, bidirectional=True, dtype=torch.float16)
    with launched() as names:
        results(layer, drawn(30, 2, 8, dtype=torch.float16))
    assert names == ["sequence_forward", "sequence_backward"]


@pytest.mark.parametrize("H", [64, 512, 3000])
def test_cuda_tensors_take_what_the_plan_says_without_a_flag(H: int) -> None:
    """PyTorch's own path too (float32, H 64; H 3000), which then gives nn.GRU's own bits, or on an L4 step (H 512)."""
    layer, x = layer_of(None, 8, H), drawn(100, 2, 8)
    planned = tritongru.plan(layer, x)
    with launched() as names:
        output = results(layer, x)["output"]
    expected = dict(planned.launches.forward + planned.launches.backward)
    assert {name: names.count(name) for name in names} == {
        n: c for n, c in expected.items() if n.startswith(("step", "sequence"))
    }
    assert (H != 512) == (planned.backend == "aten") == (not names)
    if not names:
        assert torch.equal(output, as_torch_s(layer)(x)[0])


def test_float64_runs_pytorch_s_path() -> None:
    layer, x = layer_of(None, 4, 5, dtype=torch.float64), drawn(3, 2, 4, dtype=torch.float64)
    assert torch.equal(layer(x)[0], as_torch_s(layer)(x)[0])


def test_flattened_weights_of_half_precision() -> None:
    """cuDNN's flattened weights may be aligned to two bytes only."""
    layer, x = layer_of("step", 7, 9, dtype=torch.float16), drawn(5, 3, 7, dtype=torch.float16)
    layer.flatten_parameters()
    torch.testing.assert_close(layer(x)[0], as_torch_s(layer)(x)[0], rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_as_nn_gru(dtype: torch.dtype) -> None:
    """The same values; in autocast's dtype, where cuDNN's GRU answers in float16 whichever is asked for."""
    layer, x, found = layer_of("step", 16, 32), drawn(6, 4, 16), []
    for module in (layer, as_torch_s(layer)):
        with torch.autocast("cuda", dtype=dtype):
            output, h_n = module(x)
        output.float().square().sum().backward()
        found.append((output, h_n, module.weight_hh_l0.grad))
    assert [t.dtype for t in found[0]] == [dtype, dtype, torch.float32]
    if torch.version.hip is None:
        assert [t.dtype for t in found[1]] == [torch.float16, torch.float16, torch.float32]
    for ours, other in zip(*found, strict=True):
        assert (ours.float() - other.float()).norm() <= 4 * torch.finfo(dtype).eps * other.float().norm()


@pytest.mark.parametrize("around", [nullcontext, on_a_side_stream])
def test_same_call_same_bits_and_a_copy_computes_the_same(around: Callable[[], Any]) -> None:
    layer, x = layer_of("step", 24, 48, bidirectional=True), drawn(10, 8, 24)
    expected = results(layer, x)
    for module in (layer, copy.deepcopy(layer)):
        with around():
            found = results(module, x)
        assert same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device() -> None:
    layer = tritongru.GRU(32, 64, device="cuda:1", backend="step")
    output, h_n = layer(torch.randn(4, 3, 32, device="cuda:1"))
    output.sum().backward()
    assert h_n.device.index == 1 and layer.weight_hh_l0.grad is not None


def test_memory_is_given_back() -> None:
    """No cache of anything: a second call leaves as much memory allocated as the first."""
    layer, x = layer_of("step", 64, 128), drawn(30, 32, 64)

    def after() -> int:
        results(layer, x)
        layer.zero_grad(set_to_none=True)
        return torch.cuda.memory_allocated()

    after()
    assert after() == after()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_short_way_of_one_step_gives_the_bits_of_the_long_way(dtype: torch.dtype) -> None:
    """Whose launches somebody is told of goes the long way. Two layers, and a cell."""
    gru, xs = layer_of("step", 48, 200, 2, dtype=dtype), drawn(20, 3, 48, dtype=dtype)
    cell = tritongru.GRUCell(48, 200, device=CUDA, dtype=dtype, backend="step")

    @torch.no_grad()
    def loop() -> list[Tensor]:
        h, state = torch.zeros(2, 3, 200, device=CUDA, dtype=dtype), torch.zeros(3, 200, device=CUDA, dtype=dtype)
        found = []
        for x in xs:
            y, h = gru(x[None], h)
            state = cell(x, state)
            found += [y, h, state]
        return found

    with launched() as names:
        expected = loop()
    assert names == ["step_forward"] * 60
    for _ in range(2):
        assert same_bits(loop(), expected)


# Programs that wait for each other, and launches beside others.


def test_soak_of_mixed_shapes_on_two_streams() -> None:
    """10,000 launches of many shapes on two streams: no hang, and the same call has the same bits every time."""
    shapes = [(12, 5, 203), (9, 33, 256), (20, 2, 64), (7, 16, 512), (5, 100, 130), (1, 4, 300)]
    calls = []
    for index, (T, B, H) in enumerate(shapes):
        dtype = (*HALF, torch.float32)[index % 3]
        layer = layer_of("sequence", 24, H, bidirectional=index % 2 == 0, dtype=dtype)
        x = drawn(T, B, 24, dtype=dtype, seed=index).requires_grad_()
        output, _ = layer(x)
        dy = drawn(*output.shape, dtype=dtype, seed=index)
        calls.append((layer, x, dy, output.detach(), *torch.autograd.grad(output, x, dy)))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    order = torch.randint(len(calls), (5000,), generator=torch.Generator().manual_seed(0)).tolist()  # two launches each
    wrong = [torch.zeros((), dtype=torch.int64, device=CUDA) for _ in streams]
    for turn, index in enumerate(order):
        layer, x, dy, expected, expected_dx = calls[index]
        with torch.cuda.stream(streams[turn % 2]):
            output, _ = layer(x)
            (dx,) = torch.autograd.grad(output, x, dy)
            same = (output == expected).all() & (dx == expected_dx).all()
            wrong[turn % 2].add_((~same).to(torch.int64))
        if turn % 200 == 0:
            tritongru.synchronize()
    tritongru.synchronize()
    assert [count.item() for count in wrong] == [0, 0]


def test_beside_a_kernel_of_higher_priority() -> None:
    """Programs that wait for each other may be placed while another stream takes the SMs: late, and right."""
    layer, x = layer_of("sequence", 32, 1024, dtype=torch.float16), drawn(50, 16, 32, dtype=torch.float16)
    with torch.no_grad():
        expected, other = layer(x)[0], drawn(4096, 4096)
        urgent = torch.cuda.Stream(priority=-1)
        urgent.wait_stream(torch.cuda.current_stream())
        for _ in range(50):
            with torch.cuda.stream(urgent):
                other @ other
            found = layer(x)[0]
        tritongru.synchronize()
    assert torch.equal(found, expected)


def test_a_wait_that_runs_out_is_an_error(monkeypatch) -> None:
    """Programs too few: the others wait for slices that nobody makes. Told once; the call after it is right."""
    layer, x = layer_of("sequence", 16, 256, dtype=torch.float16), drawn(4, 3, 16, dtype=torch.float16)
    with torch.no_grad():
        expected = layer(x)[0]
        monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", "0.05")
        with monkeypatch.context() as patch:
            fewer_programs(patch)
            broken = layer(x)[0]
        with pytest.raises(RuntimeError, match="TRITONGRU_WAIT_SECONDS"):
            tritongru.synchronize()
        assert broken[1:].isnan().any()
        assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_threads_compute_what_one_does(backend: str) -> None:
    """Each on a stream of its own: forward and backward at once, the bits of one thread."""
    layer = layer_of(backend, 16, 128, dtype=torch.float16)
    inputs = [drawn(9, 4, 16, dtype=torch.float16, seed=index) for index in range(4)]

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x)[0].square().sum(), x)[0]

    expected = [gradient(x) for x in inputs]
    torch.cuda.synchronize()

    def work(index: int) -> list[bool]:
        with torch.cuda.stream(torch.cuda.Stream()):
            return [torch.equal(gradient(inputs[index]), expected[index]) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(work, range(4), timeout=120))


@needs_pdl
@pytest.mark.parametrize("side", [False, True], ids=["default-stream", "side-stream"])
def test_a_step_beside_the_launch_before_it_gives_the_same_bits(side: bool, monkeypatch) -> None:
    """1,000 launches of each shape, both passes and directions, packed too, and the memory between calls is filled with
    NaN: what is read too early shows. Expected: the same tiles, every launch after the end of the one before it."""
    for H, B, T, bidirectional in BESIDE:
        layer = layer_of("step", 24, H, bidirectional=bidirectional, dtype=torch.bfloat16)
        x = drawn(T, B, 24, dtype=torch.bfloat16)
        for lengths in (None, torch.randint(1, T + 1, (B,))):
            given = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
            with launches_without_pdl(monkeypatch):
                expected = {name: t.clone() for name, t in results(layer, given).items()}
            wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
            with on_a_side_stream() if side else nullcontext():
                for _ in range(-(-500 // T)):
                    found = results(layer, given)
                    wrong += sum((found[name] != right).sum() for name, right in expected.items())
                    del found
                    torch.full((1 << 26,), float("nan"), device=CUDA, dtype=torch.bfloat16)
            assert wrong.item() == 0, (H, B, T, bidirectional, lengths is not None)


# Training.


@pytest.mark.parametrize("backend", [None, "reference", "step", "sequence"], ids=lambda backend: backend or "default")
def test_lengths_and_resets_wait_for_nothing(backend: str | None) -> None:
    """Forward and backward; a bad length is an error later, and once."""
    layer = layer_of(backend, 24, 256, bidirectional=True, dtype=torch.bfloat16)
    x = drawn(14, 40, 24, dtype=torch.bfloat16).requires_grad_()
    lengths, resets = torch.randint(1, 15, (40,), device=CUDA), torch.rand(14, 40, device=CUDA) < 0.1

    def call() -> None:
        output, h_n = layer(x, lengths=lengths, resets=resets)
        (output.float().square().sum() + h_n.float().sum()).backward()

    call()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    tritongru.synchronize()
    lengths[3] = 15
    call()
    with pytest.raises(RuntimeError, match="no element of lengths above that of input: got one that is"):
        tritongru.synchronize()


def test_a_scaler_on_the_device_trains() -> None:
    layer, head = layer_of("sequence", 8, 32), torch.nn.Linear(32, 4, device=CUDA)
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    generator = torch.Generator(CUDA).manual_seed(0)
    losses = []
    for _ in range(150):
        first = torch.randint(4, (64,), device=CUDA, generator=generator)
        x = 0.3 * torch.randn(10, 64, 8, device=CUDA, generator=generator)
        x[0, :, :4] += 2 * torch.nn.functional.one_hot(first, 4)
        with torch.autocast("cuda", torch.float16):
            loss = torch.nn.functional.cross_entropy(head(layer(x)[0][-1]), first)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
