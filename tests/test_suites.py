"""What suites are made of, how samples are taken, and what can be timed without a GPU. No time is asserted anywhere."""

import weakref
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from benchmarks import cpu, hostcost, providers, results, timing, work
from benchmarks.cases import BASELINE, Case
from benchmarks.providers import PROVIDERS, find
from benchmarks.suites import SUITES
from benchmarks.timing import CudaMeter, HostMeter, Sample, Timed, WaitsError, interleave
from benchmarks.workloads import BY_CASE, WORKLOADS
from tritongru.planning import choose, describe

DENSE, CPU = Case(4, 3, 5, 6), torch.device("cpu")


def test_every_round_samples_every_call_in_changing_order():
    class Meter(HostMeter):
        def sample(self, timed):
            order.append(timed.calls)
            return Sample(100.0, 50.0)

    order = []
    interleave({str(i): Timed(lambda: None, i) for i in range(3)}, Meter(), rounds=20, seconds=1e9)
    rounds = [tuple(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(r) == [0, 1, 2] for r in rounds) and len(set(rounds)) > 1


def test_a_sample_is_per_call():
    made, meter = [], HostMeter(iter([10.0, 10.5]).__next__)
    assert meter.sample(Timed(lambda: made.append(1), 5)).time_us == pytest.approx(1e5)
    assert len(made) == 5
    assert timing.quantiles([3.0, 1.0, 2.0]) == pytest.approx([1.4, 2.0, 2.6])
    assert timing.quantiles(range(101), (0.99,)) == [99] and timing.quantiles([7.0]) == [7.0] * 3


@pytest.fixture
def captured(monkeypatch):
    """What `CudaMeter.captured` makes of a call; whether it was captured; and whether waiting is an error now."""
    graphs, modes = [], ["default"]
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Mock)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graphs.append(graph) or nullcontext())
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return lambda call: CudaMeter.captured(HostMeter(), call), graphs, lambda: modes[-1] == "error"


def test_a_graph_is_captured_warm_and_holds_nothing_that_was_made(captured):
    made, (capture, _, _) = [], captured

    def call():
        result = torch.empty(1)
        made.append(weakref.ref(result))
        return result

    replay = capture(call)
    assert len(made) == 4 and not any(ref() for ref in made)
    replay()
    assert len(made) == 4  # the graph's launches, not the call again


@pytest.mark.parametrize(
    "error", [RuntimeError("called a synchronizing CUDA operation"), torch.AcceleratorError("ECC")]
)
def test_what_waits_for_the_device_is_found_before_a_capture_could_fail(captured, error):
    capture, graphs, waiting_is_an_error = captured

    def call():
        if waiting_is_an_error():
            raise error

    with pytest.raises(RuntimeError, match=str(error)) as found:
        capture(call)
    assert isinstance(found.value, WaitsError) == (type(error) is RuntimeError)
    assert graphs == [] and not waiting_is_an_error()


# what is right


def test_nan_is_wrong():
    truth = {"output": torch.ones(2, dtype=torch.float64)}
    found = work.errors({"output": torch.tensor([1.0, float("nan")])}, truth)
    assert work.verdict(DENSE, found, None, False) and work.verdict(DENSE, found, {"output": float("nan")}, False)
    two = {"weight_ih_l0": truth["output"], "weight_ih_l0_reverse": truth["output"]}
    nan_first = {"weight_ih_l0": torch.full((2,), float("nan")), "weight_ih_l0_reverse": torch.ones(2)}
    assert work.verdict(DENSE, work.errors(nan_first, two), None, False)


def test_the_rule_allows_what_nn_gru_itself_gets_wrong():
    assert not work.verdict(DENSE, {"output": 0.019}, {"output": 0.01}, False)
    assert work.verdict(DENSE, {"output": 0.021}, {"output": 0.01}, False)
    assert work.verdict(DENSE, {"output": 0.021}, {"output": float("nan")}, False)  # the floor is left
    assert not work.verdict(DENSE, {"output": 0.4}, None, False) and work.verdict(DENSE, {"output": 0.6}, None, False)


def test_layers_side_by_side_are_layers_of_their_own():
    module = PROVIDERS["default"].make(Case(4, 3, 5, 6, blocks=3), device="cpu", dtype=torch.float32)
    x, h_0, states = torch.randn(4, 3, 15), torch.randn(1, 3, 18), []
    for layer in module.blocks:
        layer.register_forward_pre_hook(lambda _, given: states.append(given[1]))
    output, h_n = module(x, h_0)
    assert len(states) == 3 and all(h.is_contiguous() for h in states)  # cuDNN takes no other
    for block, layer in enumerate(module.blocks):
        expected, last = layer(x[..., 5 * block : 5 * block + 5], h_0[..., 6 * block : 6 * block + 6].contiguous())
        torch.testing.assert_close(output[..., 6 * block : 6 * block + 6], expected)
        torch.testing.assert_close(h_n[..., 6 * block : 6 * block + 6], last)


def test_lengths_of_a_padded_case_are_a_shuffle_of_the_packed_one_s_and_nothing_comes_out_past_them():
    case = Case(6, 5, 3, 8, padded=True)
    module = find("reference").make(case, device="cpu", dtype=torch.float32)
    (output, *_), (lengths, _) = work.Inputs.draw(case, CPU).through(module), providers.padding(case, CPU)
    past = torch.arange(6)[:, None] >= lengths
    assert past.any() and not output[past].any() and sorted(lengths.tolist(), reverse=True) == [*case.lengths]


# without a GPU


def test_the_cpu_command_leaves_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "no_compiler", lambda: "no Triton")
    threads = torch.get_num_threads()
    try:
        assert cpu.main(tmp_path, rounds=4, seconds=0.0) == 0
    finally:
        torch.set_num_threads(threads)
    rows, modules = results.read(tmp_path / cpu.FILE), (BASELINE, providers.TWIN, "default")
    assert [(row["provider"], row["pass"]) for row in rows] == [(m, p) for p in cpu.PASSES for m in modules] * 2
    assert all(float(row["p50_us"]) > 0 and row["ratio"] and row["status"] == "ok" for row in rows)
    assert "was not measured: no Triton" in capsys.readouterr().out


@pytest.mark.compiled
def test_the_host_s_cost_is_that_of_whole_calls_that_launch_nothing():
    found = [(case.name, backend, pass_) for case, backend, pass_, times in hostcost.measure(0.0) if min(times) > 0]
    assert len(set(found)) == len(found) == 2 * (2 * len(hostcost.CASES) - 2)
    assert {backend for _, backend, _ in found} == {"step", "sequence"}


# cases


def entries_of(*names):
    return [entry for name in names or SUITES for entry in SUITES[name](describe("h200"))]


def test_no_row_of_a_day_is_taken_for_another():
    rows = [(e.case.name, provider, pass_) for e in entries_of() for provider in e.providers for pass_ in e.passes]
    assert len(set(rows)) == len(rows) > 2500
    for entry in entries_of():
        assert set(entry.passes) <= set(work.PASSES) and all(map(find, entry.providers))
        assert entry.providers[0] == BASELINE or not (entry.checked or entry.rounds)
        assert len(set(entry.providers)) == len(entry.providers)
    cases = {entry.case for entry in entries_of()}
    assert len({case.name for case in cases}) == len(cases)


def test_candidates_are_tiles_of_their_own_that_the_device_can_run():
    for entry in entries_of("tune")[:6]:
        tiles = [choose(entry.case.problem(True), describe("h200"), name).tiles for name in entry.providers[1:]]
        assert len(set(tiles)) == len(tiles) > 3


def test_workloads_say_how_many_units_a_call_computes():
    assert len(BY_CASE) == len(WORKLOADS)
    for workload in WORKLOADS:
        assert workload.entry.providers == (BASELINE, "default") and "," not in workload.unit
        assert workload.count == (sum(workload.case.lengths) or workload.case.T * workload.case.B)
    by_name = {workload.name: workload for workload in WORKLOADS}
    assert by_name["RNNoise"].rate(384_000) == "1,000,000 frames of speech (10 ms) a second"
