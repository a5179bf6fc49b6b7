"""The layer on a CUDA device: half precision and TF32, launches, devices, streams, graphs. `make gpu` runs them."""

import copy
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import tritongru
from tests.kit.cases import DTYPES, EXCHANGING_CASES, HALF, LARGE_CASES, MORE_CASES, SMALL_CASES, assert_right
from tests.kit.counting import launched
from tests.kit.inside import fewer_programs, launches_without_pdl
from tests.kit.modules import randn, results, same_bits
from tritongru import registry
from tritongru.batch import kept
from tritongru.tools.check import CASES, Case, measure

pytestmark = pytest.mark.gpu
own_process = pytest.mark.own_process  # of those that capture CUDA graphs: tests/kit/own_process.py says why
kernels = pytest.mark.parametrize("backend", ["step", "sequence"])
CUDA, DOCS = torch.device("cuda", 0), Path(__file__).parents[1] / "docs"
FP16, BF16 = HALF
CAPABILITY = torch.cuda.get_device_capability(CUDA) if torch.cuda.is_available() else (0, 0)
needs_pdl = pytest.mark.skipif(CAPABILITY < (9, 0), reason="needs compute capability 9.0")
# H, B, T, bidirectional: all of W_h ahead, a part of it, wgmma; launches that do not fill the device, and that do
BESIDE = [(512, 32, 60, False), (203, 5, 40, True), (1024, 64, 40, False), (2048, 64, 30, False), (1024, 512, 20, True)]


def drawn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return randn(*size, seed=seed).to(CUDA, dtype)


def layer_of(backend: str | None, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return tritongru.GRU(*sizes, device=CUDA, dtype=dtype, backend=backend, **options)


@contextmanager
def on_a_side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@pytest.fixture(autouse=True)
def no_wait_runs_out() -> Iterator[None]:
    yield
    tritongru.synchronize()


def refused(B: int, H: int, D: int, dtype: torch.dtype) -> str | None:
    return registry.find("sequence").too_large(torch.empty(0, dtype=dtype, device=CUDA), B, H, D, True)


RULE = [*product(("reference", "step", "sequence"), CASES + MORE_CASES + LARGE_CASES)]
RULE += product(["sequence"], EXCHANGING_CASES + SMALL_CASES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), RULE, ids=lambda given: getattr(given, "name", given))
def test_rule(backend: str, case: Case, dtype: torch.dtype) -> None:
    _, B, D = case.sizes
    if backend == "sequence" and (why_not := refused(B, case.H, D, dtype)):
        pytest.skip(why_not)
    assert_right(case, backend, dtype, CUDA)


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
    found = measure(case, "step", torch.float32, CUDA)
    assert max(figures.error for figures in found.values()) < 1e-5, found


def test_sequence_takes_one_launch_each_way() -> None:
    with launched() as names:
        results(layer_of("sequence", 8, 256, bidirectional=True, dtype=FP16), drawn(30, 2, 8, dtype=FP16))
    assert names == ["sequence_forward", "sequence_backward"]


@pytest.mark.parametrize(("H", "dtype"), [(5, torch.float64), *((H, torch.float32) for H in (64, 512, 3000))])
def test_cuda_tensors_take_what_the_plan_says_without_a_flag(H: int, dtype: torch.dtype) -> None:
    """PyTorch's own path too, but for H 512, which then gives nn.GRU's own bits; on an L4 step takes H 512."""
    layer, x = layer_of(None, 8, H, dtype=dtype), drawn(100, 2, 8, dtype=dtype)
    planned = tritongru.plan(layer, x)
    with launched() as names:
        output = results(layer, x)["output"]
    expected = planned.launches.forward + planned.launches.backward
    assert Counter(names) == {name: n for name, n in expected if name.startswith(("step", "sequence"))}
    assert (H != 512) == (planned.backend == "aten") == (not names)
    if not names:
        assert torch.equal(output, torch.nn.GRU.forward(layer, x)[0])


def test_flattened_weights_of_half_precision() -> None:
    """cuDNN's may be aligned to two bytes only."""
    layer, x = layer_of("step", 7, 9, dtype=FP16), drawn(5, 3, 7, dtype=FP16)
    layer.flatten_parameters()
    torch.testing.assert_close(layer(x)[0], torch.nn.GRU.forward(layer, x)[0], rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_as_nn_gru(dtype: torch.dtype) -> None:
    """The same values; in autocast's dtype, where cuDNN's GRU answers in float16 whichever is asked for."""
    layer, x, found = layer_of("step", 16, 32), drawn(6, 4, 16), []
    for call in (layer, partial(torch.nn.GRU.forward, layer)):
        with torch.autocast("cuda", dtype=dtype):
            output, h_n = call(x)
        found.append((output, h_n, *torch.autograd.grad(output.float().square().sum(), layer.weight_hh_l0)))
    assert [t.dtype for t in found[0]] == [dtype, dtype, torch.float32]
    if torch.version.hip is None:
        assert [t.dtype for t in found[1]] == [torch.float16, torch.float16, torch.float32]
    for ours, other in zip(*found, strict=True):
        assert (ours.float() - other.float()).norm() <= 4 * torch.finfo(dtype).eps * other.float().norm()


@pytest.mark.parametrize("around", [nullcontext, on_a_side_stream])
def test_same_call_same_bits_and_a_copy_computes_the_same(around: Callable[[], Any]) -> None:
    layer, x = layer_of("step", 24, 48, bidirectional=True), drawn(10, 8, 24)
    expected = results(layer, x)
    with around():
        found, of_copy = results(layer, x), results(copy.deepcopy(layer), x)
    assert same_bits(found, expected) and same_bits(of_copy, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device() -> None:
    found = results(tritongru.GRU(32, 64, device="cuda:1", backend="step"), torch.randn(4, 3, 32, device="cuda:1"))
    assert {tensor.device.index for tensor in found.values()} == {1}


def test_memory_is_given_back() -> None:
    """No cache of anything: a second call leaves as much memory allocated as the first."""
    layer, x = layer_of("step", 64, 128), drawn(30, 32, 64)
    allocated = []
    for _ in range(3):
        results(layer, x)
        layer.zero_grad()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[1] == allocated[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_short_way_of_one_step_gives_the_bits_of_the_long_way(dtype: torch.dtype) -> None:
    """Whose launches somebody is told of goes the long way. Two layers, and a cell."""
    gru, xs = layer_of("step", 48, 200, 2, dtype=dtype), drawn(20, 3, 48, dtype=dtype)
    cell = tritongru.GRUCell(48, 200, device=CUDA, dtype=dtype, backend="step")

    @torch.no_grad()
    def loop() -> list[Tensor]:
        h, found = torch.zeros(2, 3, 200, device=CUDA, dtype=dtype), []
        state = torch.zeros_like(h[0])
        for x in xs:
            (y, h), state = gru(x[None], h), cell(x, state)
            found += [y, h, state]
        return found

    with launched() as names:
        expected = loop()
    assert names == ["step_forward"] * 60
    assert same_bits(loop(), expected) and same_bits(loop(), expected)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_the_short_way_of_training_gives_the_bits_of_the_long_way(T: int, dtype: torch.dtype, backend: str) -> None:
    """In both directions; `sequence` of a layer that one program holds."""
    layer, xs = layer_of(backend, 48, 72, dtype=dtype, bidirectional=True), drawn(4, T, 3, 48, dtype=dtype)
    with launched():
        expected = [results(layer, x) for x in xs]
    for x, of_x in 2 * list(zip(xs, expected, strict=True)):
        assert same_bits(results(layer, x), of_x)


def test_soak_of_mixed_shapes_on_two_streams() -> None:
    """10,000 launches of many shapes on two streams: no hang, and the same call has the same bits every time."""
    shapes = [(12, 5, 203), (9, 33, 256), (20, 2, 64), (7, 16, 512), (5, 100, 130), (1, 4, 300)]

    def passes(layer: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        output, _ = layer(x)
        return output.detach(), *torch.autograd.grad(output, x, dy)

    calls = []
    for index, (T, B, H) in enumerate(shapes):
        dtype, D = (*HALF, torch.float32)[index % 3], 1 + (index % 2 == 0)
        x, dy = (drawn(T, B, size, dtype=dtype, seed=index) for size in (24, D * H))
        call = partial(passes, layer_of("sequence", 24, H, bidirectional=D == 2, dtype=dtype), x.requires_grad_(), dy)
        calls.append((call, call()))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    wrong = [torch.zeros((), dtype=torch.int64, device=CUDA) for _ in streams]
    for turn, (call, expected) in enumerate(random.Random(0).choices(calls, k=5000)):  # two launches each
        with torch.cuda.stream(streams[turn % 2]):
            wrong[turn % 2] += sum((found != right).sum() for found, right in zip(call(), expected, strict=True))
        if turn % 200 == 0:
            tritongru.synchronize()
    assert [count.item() for count in wrong] == [0, 0]


@torch.no_grad()
def test_beside_a_kernel_of_higher_priority() -> None:
    """Programs that wait for each other may be placed while another stream takes the SMs: late, and right."""
    layer, x = layer_of("sequence", 32, 1024, dtype=FP16), drawn(50, 16, 32, dtype=FP16)
    expected, other = layer(x)[0], drawn(4096, 4096)
    urgent = torch.cuda.Stream(priority=-1)
    urgent.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        with torch.cuda.stream(urgent):
            other @ other
        found = layer(x)[0]
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_wait_that_runs_out_is_an_error(monkeypatch) -> None:
    """Programs too few: the others wait for slices that nobody makes. Told once; the call after it is right."""
    layer, x = layer_of("sequence", 16, 256, dtype=FP16), drawn(4, 3, 16, dtype=FP16)
    expected = layer(x)[0]
    monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", "0.05")
    with monkeypatch.context() as patch:
        fewer_programs(patch)
        broken = layer(x)[0]
    with pytest.raises(RuntimeError, match="TRITONGRU_WAIT_SECONDS"):
        tritongru.synchronize()
    assert broken[1:].isnan().any()
    assert torch.equal(layer(x)[0], expected)


@kernels
def test_threads_compute_what_one_does(backend: str) -> None:
    """Each on a stream of its own: forward and backward at once, the bits of one thread."""
    layer = layer_of(backend, 16, 128, dtype=FP16)

    def gradient(index: int) -> Tensor:
        x = drawn(9, 4, 16, dtype=FP16, seed=index).requires_grad_()
        return torch.autograd.grad(layer(x)[0].square().sum(), x)[0]

    expected = [gradient(index) for index in range(4)]
    torch.cuda.synchronize()

    def work(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            return all(torch.equal(gradient(index), expected[index]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4), timeout=120))


@needs_pdl
@pytest.mark.parametrize("side", [False, True], ids=["default-stream", "side-stream"])
def test_a_step_beside_the_launch_before_it_gives_the_same_bits(side: bool, monkeypatch) -> None:
    """1,000 launches of each shape, both passes and directions, packed too, and the memory between calls is filled with
    NaN: what is read too early shows. Expected: the same tiles, every launch after the end of the one before it."""
    for H, B, T, bidirectional in BESIDE:
        layer, x = layer_of("step", 24, H, bidirectional=bidirectional, dtype=BF16), drawn(T, B, 24, dtype=BF16)
        for given in (x, pack_padded_sequence(x, torch.randint(1, T + 1, (B,)), enforce_sorted=False)):
            with launches_without_pdl(monkeypatch):
                expected = {name: t.clone() for name, t in results(layer, given).items()}
            wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
            with on_a_side_stream() if side else nullcontext():
                for _ in range(-(-500 // T)):
                    wrong += sum((t != expected[name]).sum() for name, t in results(layer, given).items())
                    torch.full((1 << 26,), float("nan"), device=CUDA, dtype=BF16)
            assert wrong.item() == 0, (H, B, T, bidirectional, type(given))


@pytest.mark.parametrize("backend", [None, "reference", "step", "sequence"], ids=lambda backend: backend or "default")
def test_lengths_resets_and_new_packed_batches_wait_for_nothing(backend: str | None) -> None:
    """Forward and backward; another stream reads the tables of a packed batch that this one has copied. A bad length is
    an error when the device has told of it, in that call or later, once."""
    layer, x = layer_of(backend, 24, 256, bidirectional=True, dtype=BF16), drawn(14, 40, 24, dtype=BF16)
    lengths, resets = torch.randint(1, 15, (40,), device=CUDA), torch.rand(14, 40, device=CUDA) < 0.1
    before, packed = (pack_padded_sequence(x, torch.arange(last, last + 40).clamp(max=14).flip(0)) for last in (2, 1))

    def call(given: Any = x, **how: Tensor) -> Sequence[Tensor]:
        leaf = (x if given is x else given.data).requires_grad_()
        output, h_n = layer(given, **how)
        loss = (output if given is x else output.data).float().square().sum() + h_n.float().sum()
        return torch.autograd.grad(loss, [leaf, *layer.parameters()])

    call(lengths=lengths, resets=resets)
    call(before)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(lengths=lengths, resets=resets)
        found = call(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.stream(torch.cuda.Stream()):
        again = call(packed)
    tritongru.synchronize()
    assert all(map(torch.equal, found, again))
    lengths[3] = 15
    with pytest.raises(RuntimeError, match="no element of lengths above that of input: got one that is"):
        call(lengths=lengths)
        tritongru.synchronize()
    lengths[3] = 14
    call(lengths=lengths)


def test_a_scaler_on_the_device_trains() -> None:
    layer, head = layer_of("sequence", 8, 32), torch.nn.Linear(32, 4, device=CUDA)
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    x, labels, losses = drawn(10, 64, 8), torch.arange(64, device=CUDA) % 4, []
    for _ in range(150):
        with torch.autocast("cuda", torch.float16):
            loss = torch.nn.functional.cross_entropy(head(layer(x)[0][-1]), labels)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a call after one on a side stream, and what it writes."""
    with on_a_side_stream():
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, call()


def of_page(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile((DOCS / page).read_text().split("```python\n")[1].split("```")[0], page, "exec"), names)
    return names


@own_process
@needs_pdl
@torch.no_grad()
def test_a_step_beside_the_launch_before_it_gives_the_same_bits_in_a_graph(monkeypatch) -> None:
    for H, B, T, bidirectional in BESIDE:
        layer = layer_of("step", 24, H, bidirectional=bidirectional, dtype=BF16)
        static = torch.zeros(T, B, 24, device=CUDA, dtype=BF16)
        inputs = [torch.randn_like(static) for _ in range(4)]
        with launches_without_pdl(monkeypatch):
            expected = [layer(x)[0] for x in inputs]
        graph, found = captured(lambda layer=layer, static=static: layer(static)[0])
        for turn in range(-(-1000 // T)):
            static.copy_(inputs[turn % 4])
            graph.replay()
            assert torch.equal(found, expected[turn % 4]), (H, B, T, bidirectional, turn)


@own_process
@kernels
@pytest.mark.parametrize("form", ["dense", "packed", "padded"])
@torch.no_grad()
def test_a_user_s_capture(backend: str, form: str) -> None:
    """A replay fills the exchange buffer, reads the status word, and the lengths and resets that are there then."""
    layer, static = layer_of(backend, 24, 256, bidirectional=True, dtype=BF16), drawn(14, 3, 24, dtype=BF16)
    lengths, resets = torch.tensor([14, 9, 2], device=CUDA), torch.zeros(14, 3, dtype=torch.bool, device=CUDA)
    how = {"lengths": lengths, "resets": resets} if form == "padded" else {}

    def call() -> Tensor:
        if form == "packed":
            return layer(pack_padded_sequence(static, torch.tensor([14, 9, 2])))[0].data
        return layer(static, **how)[0]

    graph, found = captured(call)
    for seed in range(20):
        kept.clear()  # as after many other packed batches; what the graph reads of its own must not be free
        [torch.full((n,), -1, dtype=torch.int32, device=CUDA) for n in range(1, 64)]
        static.copy_(drawn(14, 3, 24, seed=seed))
        lengths.copy_(torch.randint(1, 15, (3,)))
        resets.copy_(torch.rand(14, 3) < 0.2)
        graph.replay()
        assert torch.equal(found, call())


@own_process
@kernels
def test_make_graphed_callables(backend: str) -> None:
    """Eager calls come after the capture, which fails while nodes of theirs live on the default stream."""
    layer = layer_of(backend, 24, 256, dtype=FP16)
    eager = copy.deepcopy(layer)
    sample, *inputs = (drawn(12, 8, 24, dtype=FP16, seed=seed) for seed in range(4))
    graphed = torch.cuda.make_graphed_callables(layer, (sample.requires_grad_(),))  # calls it before, on a side stream
    found = [{name: t.clone() for name, t in results(graphed, x).items()} for x in inputs]  # written again by a replay
    for x, of_graph in zip(inputs, found, strict=True):
        assert same_bits(of_graph, results(eager, x))


@own_process
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_as_eager(mode: str, dynamo: Any) -> None:
    """Inductor, with CUDA graphs of its own in the second mode: values and gradients of the eager call."""
    head, layer = torch.nn.Linear(64, 3, device=CUDA), layer_of(None, 16, 64, num_layers=2, batch_first=True)

    def loss(x: Tensor) -> Tensor:
        output, h_n = layer(torch.tanh(x))
        return head(output).square().mean() + h_n.square().mean()

    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for T in (20, 20, 20, 31):
        x = drawn(5, T, 16)
        found = [torch.autograd.grad(call(x), list(layer.parameters())) for call in (loss, compiled)]
        for eager, graph in zip(*found, strict=True):
            assert (eager - graph).norm() <= 1e-2 * eager.norm()  # TF32, and Inductor's own rounding around it


@own_process
@torch.no_grad()
def test_a_packed_batch_in_inductor_s_cuda_graphs(dynamo: Any) -> None:
    """Of the same graph with other lengths: right, or an error, PyTorch's or ours, once it would be captured."""
    layer, h_0 = layer_of("sequence", 16, 64), drawn(1, 5, 64)

    def call(x: Tensor, batch_sizes: Tensor) -> Tensor:
        return layer(PackedSequence(x, batch_sizes), h_0)[0].data * 2

    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for turn, sizes in enumerate(((5, 3, 2, 2), (5, 5, 1, 1), (5, 4, 2, 1), (5, 3, 2, 2))):
        given = drawn(12, 16), torch.tensor(sizes)
        try:
            found = compiled(*given)
        except RuntimeError as error:
            assert turn, error  # nothing is captured in the first one
            assert re.search("cannot be part of a CUDA graph|not allocated in pool", str(error)), error
            break
        assert torch.allclose(found, call(*given), atol=1e-5)


@own_process
@torch.no_grad()
def test_the_policy_in_a_graph_of_the_documents() -> None:
    """Its steps, with episodes that end, are those of the rollout as a whole."""
    names = of_page("padded.md")
    observations, is_init = torch.randn(20, 32, 8, device=CUDA), torch.rand(20, 32, device=CUDA) < 0.2
    is_init[0] = True
    acted = [(names["step"](*given).clone(), names["h"].clone()) for given in zip(observations, is_init, strict=True)]
    policy = tritongru.GRU(8, 64, device=CUDA)
    policy.load_state_dict({f"{name}_l0": p for name, p in names["cell"].state_dict().items()})
    output, _ = policy(observations, resets=is_init)
    assert torch.allclose(output, torch.stack([h for _, h in acted]), atol=0.02)  # TF32 in one of them


@own_process
@torch.no_grad()
def test_the_streaming_loop_of_the_docs() -> None:
    """docs/streaming.md runs as it stands, and gives what nn.GRUCell does, called one by one on the same weights."""
    cell, stream, outputs = map(of_page("streaming.md").get, ("cell", "stream", "outputs"))
    theirs = torch.nn.GRUCell(64, 256, device=CUDA, dtype=torch.float64)
    theirs.load_state_dict(cell.state_dict())
    true, state = torch.zeros(1, 256, device=CUDA, dtype=torch.float64), torch.zeros_like(outputs[0])
    for x_t, found in zip(stream, outputs, strict=True):
        true, state = theirs(x_t.double(), true), cell(x_t, state)
        assert torch.equal(found, state)
    assert (found - true).norm() <= 0.05 * true.norm()  # the state is rounded to bfloat16 at every step


@own_process
def test_the_harness_measures_every_kind_of_provider() -> None:
    from benchmarks import cases, run, timing

    providers = ("nn.GRU", "default", "reference", "step", "sequence")
    passes = ("inference", "forward", "forward+backward", "streaming")
    entry = cases.Entry(cases.Case(9, 5, 24, 40, "fp16"), passes, providers)
    rows = list(run.measure(entry, timing.CudaMeter()))
    assert len(rows) == len(providers) * len(passes)
    for row in rows:
        assert (row.status, row.l2) == ("ok", "warm") and row.note.startswith("host "), row
        assert row.p50_us and row.host_us and row.ratio and row.errors and row.device_us, row
        assert row.pass_ != "forward+backward" or (row.peak_mib and row.saved_mib), row
    # nn.GRU over the sequences, whose lengths the host has to know
    entry = cases.Entry(cases.Case(9, 5, 24, 40, resets=0.2), ("forward+backward",), ("nn.GRU", "sequence"))
    theirs, ours = run.measure(entry, timing.CudaMeter())
    assert (theirs.status, theirs.device_us) == ("ok", None) and "in no CUDA graph" in theirs.note
    assert ours.status == "ok" and ours.device_us
