"""The layer in CUDA graphs, each test in a process of its own (tests/kit/own_process.py says why)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import tritongru
from tests.kit.gpu import BESIDE, CUDA, captured, drawn, layer_of, needs_pdl, of_page
from tests.kit.inside import launches_without_pdl
from tests.kit.modules import results, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.own_process]


@needs_pdl
@torch.no_grad()
def test_a_step_beside_the_launch_before_it_gives_the_same_bits_in_a_graph(monkeypatch) -> None:
    for H, B, T, bidirectional in BESIDE:
        layer = layer_of("step", 24, H, bidirectional=bidirectional, dtype=torch.bfloat16)
        static = torch.zeros(T, B, 24, device=CUDA, dtype=torch.bfloat16)
        inputs = [torch.randn_like(static) for _ in range(4)]
        with launches_without_pdl(monkeypatch):
            expected = [layer(x)[0] for x in inputs]
        graph, found = captured(lambda layer=layer, static=static: layer(static)[0])
        for turn in range(-(-1000 // T)):
            static.copy_(inputs[turn % 4])
            graph.replay()
            assert torch.equal(found, expected[turn % 4]), (H, B, T, bidirectional, turn)


@pytest.mark.parametrize("backend", ["step", "sequence"])
@pytest.mark.parametrize("form", ["dense", "packed", "padded"])
@torch.no_grad()
def test_a_user_s_capture(backend: str, form: str) -> None:
    """torch.cuda.graph after one call; the exchange buffer is filled and the status word read inside the graph, which
    reads the lengths and resets that are there when it is replayed."""
    layer = layer_of(backend, 24, 256, bidirectional=True, dtype=torch.bfloat16)
    static = drawn(14, 3, 24, dtype=torch.bfloat16)
    lengths, resets = torch.tensor([14, 9, 2], device=CUDA), torch.zeros(14, 3, dtype=torch.bool, device=CUDA)

    def call() -> Tensor:
        if form == "packed":
            return layer(pack_padded_sequence(static, torch.tensor([14, 9, 2])))[0].data
        return layer(static, **({"lengths": lengths, "resets": resets} if form == "padded" else {}))[0]

    graph, found = captured(call)
    for seed in range(20):
        static.copy_(drawn(14, 3, 24, seed=seed))
        lengths.copy_(torch.randint(1, 15, (3,)))
        resets.copy_(torch.rand(14, 3) < 0.2)
        graph.replay()
        assert torch.equal(found, call())


@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_make_graphed_callables(backend: str) -> None:
    """Forward and backward replayed on new inputs: the bits of eager calls, gradients included.

    Eager calls come after the capture. As long as an output of one lives, so do the nodes that add up its parameters'
    gradients, on the stream of that call: where it is the default one, no other stream may be captured beside it.
    """
    layer = layer_of(backend, 24, 256, dtype=torch.float16)
    eager = copy.deepcopy(layer)
    sample, *inputs = (drawn(12, 8, 24, dtype=torch.float16, seed=seed) for seed in range(4))
    graphed = torch.cuda.make_graphed_callables(layer, (sample.requires_grad_(),))  # calls it before, on a side stream
    # A graph's own are written again.
    found = [{name: t.clone() for name, t in results(graphed, x).items()} for x in inputs]
    for x, of_graph in zip(inputs, found, strict=True):
        assert same_bits(of_graph, results(eager, x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_as_eager(mode: str) -> None:
    """Inductor, with CUDA graphs of its own in the second mode: values and gradients of the eager call."""
    head, layer = torch.nn.Linear(64, 3, device=CUDA), layer_of(None, 16, 64, num_layers=2, batch_first=True)

    def loss(x: Tensor) -> Tensor:
        output, h_n = layer(torch.tanh(x))
        return head(output).square().mean() + h_n.square().mean()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(loss, fullgraph=True, mode=mode)
        for T in (20, 20, 20, 31):
            x, found = drawn(5, T, 16), []
            for call in (loss, compiled):
                layer.zero_grad()
                call(x).backward()
                found.append([p.grad.clone() for p in layer.parameters()])
            for eager, graph in zip(*found, strict=True):
                assert (eager - graph).norm() <= 1e-2 * eager.norm()  # TF32, and Inductor's own rounding around it
    torch._dynamo.reset()


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


@torch.no_grad()
def test_the_streaming_loop_of_the_docs() -> None:
    """docs/streaming.md runs as it stands, and gives what nn.GRUCell does, called one by one on the same weights."""
    names = of_page("streaming.md")
    cell, stream, outputs = names["cell"], names["stream"], names["outputs"]
    theirs = torch.nn.GRUCell(64, 256, device=CUDA, dtype=torch.float64)
    theirs.load_state_dict(cell.state_dict())
    true, state = torch.zeros(1, 256, device=CUDA, dtype=torch.float64), torch.zeros_like(outputs[0])
    for x_t, found in zip(stream, outputs, strict=True):
        true, state = theirs(x_t.double(), true), cell(x_t, state)
        assert torch.equal(found, state)
    assert (found - true).norm() <= 0.05 * true.norm()  # the state is rounded to bfloat16 at every step


def test_the_harness_measures_every_kind_of_provider() -> None:
    """Graphs captured and replayed, times, memory: a row of each that says ok."""
    from benchmarks.cases import Case, Entry
    from benchmarks.run import measure
    from benchmarks.timing import CudaMeter

    providers = ("nn.GRU", "default", "reference", "step", "sequence")
    entry = Entry(Case(9, 5, 24, 40, "fp16"), ("inference", "forward", "forward+backward", "streaming"), providers)
    rows = list(measure(entry, CudaMeter()))
    assert [(row.provider, row.pass_) for row in rows if row.status != "ok"] == [], [row.note for row in rows]
    assert len(rows) == len(providers) * 4 and {row.l2 for row in rows} == {"warm"}
    for row in rows:
        assert row.p50_us and row.host_us and row.ratio and row.errors and row.device_us, row.note
        assert row.note.startswith("host ")
        if row.pass_ == "forward+backward":
            assert row.peak_mib and row.saved_mib
