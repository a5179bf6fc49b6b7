"""How a call is settled: which backend runs, what is said about it, in which dtype it computes, beside which threads.

Tolerance: tests/kit/modules.py; results under autocast to bfloat16 are held against float32 within 4 * eps(bfloat16)
times the same scale: three roundings of half an eps on the way (input, weight, result) and the recurrence's passing on
of earlier ones."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tritongru
from tests.kit import inside
from tests.kit.counting import looked_into
from tests.kit.modules import (
    FORMS,
    OURS,
    PLAIN,
    as_function,
    assert_same,
    ours_by_form,
    ours_only,
    pair,
    randn,
    results,
    same_bits,
    trained,
)

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def no_choice_by_environment(monkeypatch):
    monkeypatch.delenv("TRITONGRU_BACKEND", raising=False)


# Which backend runs.


def test_cpu_tensors_take_aten_by_default(ran):
    theirs, ours = PLAIN.pair(None)
    assert same_bits(PLAIN.results(ours), PLAIN.results(theirs))
    tritongru.GRUCell(3, 5)(randn(2, 3))
    assert ran == []


@ours_only
def test_an_argument_use_backend_and_the_environment_name_the_backend(backend, ran, monkeypatch):
    pair(backend, 3, 5, num_layers=2)[1](randn(3, 2, 3))
    assert ran == [backend, backend]  # once per layer
    tritongru.GRUCell(3, 5, backend=backend)(randn(2, 3))
    free, cell = tritongru.GRU(3, 5), tritongru.GRUCell(3, 5)
    as_function(free, tritongru.gru, backend=backend)(randn(3, 2, 3), torch.zeros(1, 2, 5))
    as_function(cell, tritongru.gru_cell, backend=backend)(randn(2, 3), torch.zeros(2, 5))
    assert ran == [backend] * 5
    with tritongru.use_backend(backend):
        free(randn(3, 2, 3))
    free(randn(3, 2, 3))
    assert ran == [backend] * 6
    monkeypatch.setenv("TRITONGRU_BACKEND", backend)
    free(randn(3, 2, 3))
    cell(randn(2, 3))
    monkeypatch.setenv("TRITONGRU_BACKEND", "")
    free(randn(3, 2, 3))
    assert ran == [backend] * 8


def test_the_argument_wins_over_use_backend_which_wins_over_the_environment(ran, monkeypatch):
    free, bound = tritongru.GRU(3, 5), tritongru.GRU(3, 5, backend="reference")

    def runs(layer):
        before = len(ran)
        layer(randn(3, 2, 3))
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


@ours_only
def test_backward_after_the_block_stays_with_the_backend_of_forward(backend):
    theirs, ours = PLAIN.pair(None)

    def call(x, hx):
        with tritongru.use_backend(backend):
            return ours(x, hx)

    assert_same(results(call, *PLAIN.given(), of=ours), PLAIN.results(theirs))
    assert "GRULayer" in type(call(*PLAIN.given())[0].grad_fn).__name__


def test_unknown_names_are_refused_with_the_valid_ones(monkeypatch):
    layer, cell = tritongru.GRU(3, 5), tritongru.GRUCell(3, 5)

    def refused(call):
        with pytest.raises(ValueError, match=r"backend must be one of aten, reference, step.*, got 'cudnn'"):
            call()

    refused(lambda: tritongru.use_backend("cudnn").__enter__())
    monkeypatch.setenv("TRITONGRU_BACKEND", "cudnn")
    refused(lambda: layer(randn(3, 2, 3)))
    refused(lambda: cell(randn(2, 3)))
    monkeypatch.delenv("TRITONGRU_BACKEND")
    layer.backend = "cudnn"
    refused(lambda: layer(randn(3, 2, 3)))


class Marked(torch.Tensor):
    """A subclass that nobody knows."""


def refused(call, name, reason):
    with pytest.raises(RuntimeError) as caught:
        call()
    words = str(caught.value)
    _, _, able = words.partition("; these can: ")
    assert f"backend {name!r} cannot run here" in words and reason in words
    assert "aten" in able.split(", ") and name not in able.split(", ")


@ours_only
def test_a_forced_backend_that_cannot_run_is_refused_in_words(backend, monkeypatch):
    layer, cell = tritongru.GRU(3, 5, backend=backend), tritongru.GRUCell(3, 5, backend=backend)
    refused(lambda: layer(randn(3, 2, 3).as_subclass(Marked)), backend, "tensor subclass")
    if backend != "reference":
        for module, x in ((tritongru.GRU(3, 5, backend=backend), randn(3, 2, 3)), (cell, randn(2, 3))):
            refused(lambda m=module, x=x: m.double()(x.double()), backend, "fp32, fp16, bf16")
        with monkeypatch.context() as patch, tritongru.use_backend(backend):
            inside.without(patch, interpreter=True)
            refused(lambda: tritongru.GRU(3, 5)(randn(3, 2, 3)), backend, "TRITON_INTERPRET=1")
            refused(lambda: tritongru.GRUCell(3, 5)(randn(2, 3)), backend, "TRITON_INTERPRET=1")
        inside.without(monkeypatch, triton=True)
        refused(lambda: layer(randn(3, 2, 3)), backend, "Triton is not installed")


@pytest.mark.filterwarnings("ignore:Complex modules")
@ours_only
def test_a_forced_backend_serves_a_dtype_as_nn_gru_does_or_refuses_it_in_words(backend):
    theirs, ours = PLAIN.pair(backend)
    for dtype in (torch.float64, torch.complex64):
        x = randn(3, 2, 3).to(dtype)
        expected = theirs.to(dtype)(x)[0]
        try:
            found = ours.to(dtype)(x)[0]
        except RuntimeError as error:
            assert f"backend {backend!r} cannot run here" in str(error)
        else:
            torch.testing.assert_close(found, expected)


def test_backends_lists_what_exists_and_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    inside.without(monkeypatch, triton=True)
    found = {status.name: status for status in tritongru.backends()}
    assert list(found)[:3] == ["aten", "reference", "step"]
    assert found["aten"].why_not is None and found["reference"].why_not is None
    assert "not installed" in found["step"].why_not and found["step"].device == "cpu"


# What is said about it.


@pytest.fixture
def messages(caplog):
    """caplog in a process in which nothing has been logged yet."""
    inside.forget_logs()
    caplog.set_level(logging.INFO, logger="tritongru")
    yield caplog
    inside.forget_logs()


def transformed(layer):
    torch.func.jacrev(lambda x: layer(x)[1])(randn(2, 1, 3))


def of_two_sizes(layer):
    layer(randn(3, 2, 3))
    layer(randn(2, 2, 3))


SAID = [
    pytest.param(None, of_two_sizes, "aten", id="default"),
    *(pytest.param(*getattr(b, "values", [b]), of_two_sizes, "forced", marks=getattr(b, "marks", ())) for b in OURS),
    pytest.param("reference", transformed, "aten", id="transform"),
]


@pytest.mark.parametrize(("backend", "call", "word"), SAID)
def test_the_path_is_logged_once(messages, backend, call, word):
    layer = tritongru.GRU(3, 5, 2, backend=backend)
    for _ in range(3):
        call(layer)
    (record,) = messages.records
    assert record.name == "tritongru" and record.levelno == logging.INFO
    assert (repr(backend) if word == "forced" else word) in record.getMessage()


def test_a_fallback_is_logged_once_as_a_warning_with_its_reason(messages):
    for _ in range(2):
        assert inside.fall_back("a tensor subclass", randn(3, 2, 3)) == "result"
    (record,) = messages.records
    assert record.levelno == logging.WARNING and "a tensor subclass" in record.getMessage()


def test_nothing_is_printed_or_warned_by_default(backend, capfd, recwarn):
    trained(tritongru.GRU(3, 5, backend=backend), randn(3, 2, 3))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


# Autocast.


def test_under_autocast_aten_is_nn_gru():
    for backend in ("aten", None):
        theirs, ours = PLAIN.pair(backend)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = theirs(randn(3, 2, 3)), ours(randn(3, 2, 3))
        assert same_bits(found, expected) and [a.dtype for a in found] == [e.dtype for e in expected]


@ours_by_form()
def test_autocast_computes_in_bfloat16_and_trains_float32_parameters(backend, form):
    theirs, ours = form.pair(backend)

    def autocast(x, *given, **how):
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(x, *given, **how)
            assert (randn(2, 2) @ randn(2, 2)).dtype == torch.bfloat16  # left as it was
        assert not torch.is_autocast_enabled("cpu")
        return found

    found, expected = form.results(autocast, of=ours), form.results(theirs)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert found[name].dtype == (torch.float32 if name.startswith("d ") else torch.bfloat16)
        atol = 4 * torch.finfo(torch.bfloat16).eps * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(found[name].float(), reference, rtol=0, atol=atol)
    assert not torch.equal(found["output"].float(), expected["output"])  # the products did run in bfloat16


@ours_only
def test_autocast_of_mixed_dtypes_to_another_dtype_and_switched_off(backend):
    _, ours = PLAIN.pair(backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(randn(3, 2, 3).bfloat16(), randn(1, 2, 5))[0].dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert ours(randn(3, 2, 3))[0].dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert ours(randn(3, 2, 3))[0].dtype == torch.float16


# Threads, and what the host must not wait for.


@ours_only
def test_threads_compute_what_one_does(backend):
    """Forward and backward at once, on one layer and on several, without a lock of the caller's."""
    layers = [PLAIN.pair(backend)[1], pair(backend, 3, 5, seed=1)[1]]
    inputs = [randn(2 + index % 2, 2, 3, seed=index) for index in range(4)]
    start = threading.Barrier(len(inputs))

    def gradients(index):
        x, layer = inputs[index].clone().requires_grad_(), layers[index // 2]
        output, h_n = layer(x)
        return [output, *torch.autograd.grad(output.square().sum() + h_n.sum(), [x, *layer.parameters()])]

    expected = [gradients(index) for index in range(len(inputs))]

    def work(index):
        start.wait(60)
        return all(same_bits(gradients(index), expected[index]) for _ in range(3))

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs)), timeout=120))


def test_use_backend_is_a_thread_s_own():
    seen, inner, done = {}, threading.Event(), threading.Event()

    def other():
        with tritongru.use_backend("reference"):
            inner.set()
            done.wait(30)
            seen["other"] = inside.asked_for()

    thread = threading.Thread(target=other)
    thread.start()
    assert inner.wait(30)
    assert inside.asked_for() is None
    with tritongru.use_backend("aten"):
        done.set()
        thread.join(30)
    assert seen == {"other": "reference"}


class ReadByTheHost(TorchDispatchMode):
    """The tensors whose values the host asks for inside: on a GPU it would wait for each."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.tensors.append(args[0])
        return func(*args, **(kwargs or {}))


@ours_by_form({name: form for name, form in FORMS.items() if not form.resets})
def test_the_host_reads_no_tensor_of_a_call(backend, form, few_rows_at_once, monkeypatch):
    """Forward and backward, after a first call: nothing but the reports of waits that ran out and of wrong lengths,
    which lie in the host's own memory, as batch_sizes of packed input does. (It sees item() and bool(), not tolist()
    nor cpu() of a host tensor, nor what the driver waits for.)"""
    few_rows_at_once(4)
    _, layer = form.pair(backend)
    given = form.given()
    results(layer, *given)
    with looked_into(monkeypatch), ReadByTheHost() as read:
        results(layer, *given)
    allowed = [*inside.reports_to_the_host(), *([given[0].batch_sizes] if form.lengths else [])]
    memory = {t.untyped_storage().data_ptr() for t in allowed}
    assert [t for t in read.tensors if t.untyped_storage().data_ptr() not in memory] == []
