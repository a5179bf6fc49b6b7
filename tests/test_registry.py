"""How a call is settled: which backend runs, what is said about it, in which dtype it computes, beside which threads.

Tolerance: tests/kit/modules.py; results under autocast to bfloat16 are held against float32 within 4 * eps(bfloat16)
times the same scale: three roundings of half an eps on the way (input, weight, result) and the recurrence's passing on
of earlier ones."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tritongru
from tests.kit import inside
from tests.kit import modules as kit
from tests.kit.counting import looked_into
from tests.kit.operators import Seen


@pytest.fixture(autouse=True)
def no_choice_by_environment(monkeypatch):
    monkeypatch.delenv("TRITONGRU_BACKEND", raising=False)


@pytest.mark.parametrize("backend", ["aten", None])
def test_cpu_tensors_take_aten_by_default(backend, ran):
    theirs, ours = kit.PLAIN.pair(backend)
    assert kit.same_bits(kit.PLAIN.results(ours), kit.PLAIN.results(theirs))
    with torch.autocast("cpu", torch.bfloat16):
        assert kit.same_bits(*(module(kit.randn(3, 2, 3)) for module in (ours, theirs)))
    tritongru.GRUCell(3, 5, backend=backend)(kit.randn(2, 3))
    assert ran == []


@kit.ours_only
def test_an_argument_use_backend_and_the_environment_name_the_backend(backend, ran, monkeypatch):
    free, cell, of_two = tritongru.GRU(3, 5), tritongru.GRUCell(3, 5), tritongru.GRU(3, 5, 2, backend=backend)
    x, h = kit.randn(3, 2, 3), torch.zeros(1, 2, 5)
    of_two(x)
    tritongru.GRUCell(3, 5, backend=backend)(x[0])
    kit.as_function(free, tritongru.gru, backend=backend)(x, h)
    kit.as_function(cell, tritongru.gru_cell, backend=backend)(x[0], h[0])
    assert ran == [backend] * 5  # once per layer
    with tritongru.use_backend(backend):
        free(x)
    free(x)
    assert ran == [backend] * 6
    for name in (backend, ""):
        monkeypatch.setenv("TRITONGRU_BACKEND", name)
        free(x)
        cell(x[0])
    assert ran == [backend] * 8


def test_the_argument_wins_over_use_backend_which_wins_over_the_environment(ran, monkeypatch):
    free, bound = tritongru.GRU(3, 5), tritongru.GRU(3, 5, backend="reference")

    def runs(layer):
        before = len(ran)
        layer(kit.randn(3, 2, 3))
        return ran[before:] == ["reference"]

    with tritongru.use_backend("reference"), tritongru.use_backend(None):
        assert not runs(free)  # lifted
    with pytest.raises(ZeroDivisionError), tritongru.use_backend("reference"):
        raise ZeroDivisionError
    assert not runs(free)
    monkeypatch.setenv("TRITONGRU_BACKEND", "reference")
    with tritongru.use_backend("aten"):
        assert not runs(free) and runs(bound)
        with tritongru.use_backend("reference"):
            assert runs(free)
        assert not runs(free)
    assert runs(free)


@kit.ours_only
def test_backward_after_the_block_stays_with_the_backend_of_forward(backend):
    layer = tritongru.GRU(3, 5)
    with tritongru.use_backend(backend):
        output, _ = layer(kit.randn(3, 2, 3))
    with tritongru.use_backend("aten"):
        output.sum().backward()
    assert "GRULayer" in type(output.grad_fn).__name__ and layer.weight_hh_l0.grad.any()


def test_unknown_names_are_refused_with_the_valid_ones(monkeypatch):
    def refused(call):
        with pytest.raises(ValueError, match=r"backend must be one of aten, reference, step.*, got 'cudnn'"):
            call()

    refused(tritongru.use_backend("cudnn").__enter__)
    for kind, x in ((tritongru.GRU, kit.randn(3, 2, 3)), (tritongru.GRUCell, kit.randn(2, 3))):
        refused(lambda kind=kind: kind(3, 5, backend="cudnn"))
        layer = kind(3, 5)
        with monkeypatch.context() as patch:
            patch.setenv("TRITONGRU_BACKEND", "cudnn")
            refused(lambda layer=layer, x=x: layer(x))
        layer.backend = "cudnn"
        refused(lambda layer=layer, x=x: layer(x))


@pytest.mark.filterwarnings("ignore:Complex modules")
@kit.ours_only
def test_a_forced_backend_that_cannot_run_is_refused_in_words(backend, monkeypatch):
    def refused(reason, convert=lambda of: of):
        for make, x in ((tritongru.GRU, kit.randn(3, 2, 3)), (tritongru.GRUCell, kit.randn(2, 3))):
            with pytest.raises(RuntimeError) as caught:
                convert(make(3, 5, backend=backend))(convert(x))
            what, _, able = str(caught.value).partition("; these can: ")
            assert f"backend {backend!r} cannot run here" in what and reason in what
            assert "aten" in able.split(", ") and backend not in able.split(", ")

    marked = type("Marked", (torch.Tensor,), {})
    refused("tensor subclass", lambda of: of.as_subclass(marked) if isinstance(of, torch.Tensor) else of)
    refused("it takes fp32, fp16, bf16", lambda of: of.to(torch.complex64))
    if backend != "reference":
        refused("fp32, fp16, bf16", lambda of: of.double())
        with monkeypatch.context() as patch:
            inside.without(patch, interpreter=True)
            refused("TRITON_INTERPRET=1")
        inside.without(monkeypatch, triton=True)
        refused("Triton is not installed")


CALL = tritongru.GRU.__call__
BY_TRANSFORM = "reference", lambda layer, x: torch.func.jacrev(lambda x: layer(x)[1])(x), "aten"
SAID = [(None, CALL, "aten"), ("reference", CALL, "'reference'"), BY_TRANSFORM]


@pytest.mark.parametrize(("backend", "call", "word"), SAID)
def test_the_path_is_logged_once(messages, backend, call, word):
    layer = tritongru.GRU(3, 5, 2, backend=backend)
    for T in (2, 3, 2):
        call(layer, kit.randn(T, 1, 3))
    (record,) = messages.records
    assert record.name == "tritongru" and record.levelno == logging.INFO and word in record.getMessage()


def test_a_fallback_is_logged_once_as_a_warning_with_its_reason(messages):
    for _ in range(2):
        assert inside.fall_back("a tensor subclass", kit.randn(3, 2, 3)) == "result"
    (record,) = messages.records
    assert record.levelno == logging.WARNING and "a tensor subclass" in record.getMessage()


def test_nothing_is_printed_or_warned_by_default(backend, capfd, recwarn):
    kit.results(tritongru.GRU(3, 5, backend=backend), kit.randn(3, 2, 3))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@kit.ours_by_form()
def test_autocast_computes_in_bfloat16_and_trains_float32_parameters(backend, form):
    theirs, ours = form.pair(backend)

    def autocast(x, *given, **how):
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(x, *given, **how)
            assert (kit.randn(2, 2) @ kit.randn(2, 2)).dtype == torch.bfloat16  # left as it was
        assert not torch.is_autocast_enabled("cpu")
        return found

    found, expected = form.results(autocast, of=ours), form.results(theirs)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert found[name].dtype == (torch.float32 if name.startswith("d ") else torch.bfloat16)
        atol = 4 * torch.finfo(torch.bfloat16).eps * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(found[name].float(), reference, rtol=0, atol=atol)
    assert not torch.equal(found["output"].float(), expected["output"])  # the products did run in bfloat16


@kit.ours_only
def test_autocast_of_mixed_dtypes_to_another_dtype_and_switched_off(backend):
    _, ours = kit.PLAIN.pair(backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(kit.randn(3, 2, 3).bfloat16(), kit.randn(1, 2, 5))[0].dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert ours(kit.randn(3, 2, 3))[0].dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert ours(kit.randn(3, 2, 3))[0].dtype == torch.float16


@kit.ours_only
def test_threads_compute_what_one_does(backend):
    layers = [kit.PLAIN.pair(backend)[1], kit.pair(backend, 3, 5, seed=1)[1]]
    inputs = [kit.randn(2 + index % 2, 2, 3, seed=index) for index in range(4)]
    start = threading.Barrier(len(inputs))

    def gradients(index):
        x, layer = inputs[index].clone().requires_grad_(), layers[index // 2]
        output, h_n = layer(x)
        return [output, *torch.autograd.grad(output.square().sum() + h_n.sum(), [x, *layer.parameters()])]

    expected = [gradients(index) for index in range(len(inputs))]

    def work(index):
        start.wait(60)
        return all(kit.same_bits(gradients(index), expected[index]) for _ in range(3))

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs)), timeout=120))


def test_use_backend_is_a_thread_s_own():
    with ThreadPoolExecutor(1) as pool, tritongru.use_backend("reference"):
        assert (inside.asked_for(), pool.submit(inside.asked_for).result()) == ("reference", None)


@kit.ours_by_form({name: form for name, form in kit.FORMS.items() if not form.resets})
def test_the_host_reads_no_tensor_of_a_call(backend, form, few_rows_at_once, monkeypatch):
    """Forward and backward, after a first call: nothing but the reports of waits that ran out and of wrong lengths,
    which lie in the host's own memory, as batch_sizes of packed input does. (It sees item() and bool(), not tolist()
    nor cpu() of a host tensor, nor what the driver waits for.)"""
    few_rows_at_once(4)
    _, layer = form.pair(backend)
    given = form.given()
    kit.results(layer, *given)
    with looked_into(monkeypatch), Seen() as seen:
        kit.results(layer, *given)
    reading = ("aten._local_scalar_dense.default", "aten.nonzero.default")
    read = {args[0].untyped_storage().data_ptr() for name, args in seen.calls if name in reading}
    allowed = [*inside.reports_to_the_host(), *([given[0].batch_sizes] if form.lengths else [])]
    assert read <= {t.untyped_storage().data_ptr() for t in allowed}
