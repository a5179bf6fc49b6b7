"""Which rows of a batch run when: what is kept of it, and lengths and resets against nn.GRU, sequence by sequence."""

import gc
import math
import tracemalloc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.kit.cases import assert_not_wrong, assert_right
from tests.kit.inside import in_a_capture
from tests.kit.modules import BACKENDS, assert_close, randn, same_bits
from tritongru import batch
from tritongru.tools.check import Case, draw, run


@pytest.mark.parametrize("T, shapes", [(20_000, 40), (4, 3000)], ids=["long", "many"])
def test_tables_of_packed_batches_are_a_few_mebibytes_in_all(T, shapes):
    """On the host and on the device together; the last one is there when it is asked for again."""
    batch.kept.clear()

    def table(B):
        return batch.tables((B,) * (T - 1) + (1,), torch.device("cpu"))[0]

    gc.collect()
    tracemalloc.start()
    for B in range(1, shapes + 1):
        last = table(B)
    assert table(shapes).data_ptr() == last.data_ptr()
    gc.collect()
    on_host, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = list(batch.kept.values())
    assert 0 < len(found) < shapes
    assert on_host + sum(table.rows.nbytes for table in found) < 5 << 20


def test_tables_that_a_captured_graph_reads_stay(monkeypatch):
    """It knows their addresses alone. Of the same batch the next call takes the same ones."""
    sizes, cpu = (3, 2, 2), torch.device("cpu")
    in_a_capture(monkeypatch)
    read = StorageWeakRef(batch.tables(sizes, cpu)[0].untyped_storage())
    batch.kept.clear()
    assert not read.expired()
    assert batch.tables(sizes, cpu)[0].untyped_storage()._cdata == read.cdata


SMALL = pytest.param("sequence:exchange=0", id="small", marks=pytest.mark.interpreted)
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, SMALL])
LENGTHS_OF_18 = (3,) * 9 + (4, 1) + (2,) * 6 + (4,)
CASES = (
    Case(T=5, I=3, H=10, bidirectional=True, lengths=(5, 1, 3), padded=True),
    Case(T=4, I=3, H=9, lengths=(2, 1, 3), padded=True, batch_first=True),  # none as long as x
    Case(T=4, B=3, I=3, H=10, bidirectional=True, resets=0.4),
    Case(T=3, B=2, I=3, H=10, bidirectional=True, resets=1.0, bias=False),
    Case(T=5, I=3, H=10, layers=2, bidirectional=True, batch_first=True, lengths=(4, 5, 1), padded=True, resets=0.3),
    Case(T=5, I=3, H=10, bidirectional=True, lengths=(2, 5, 4), padded=True, resets=0.3, recompute=True),
    Case(T=4, I=3, H=10, bidirectional=True, lengths=LENGTHS_OF_18, padded=True, resets=0.3),  # two tiles of rows
    Case(T=1, B=2, I=3, H=10, bidirectional=True, resets=0.5),
    Case(T=1, B=3, I=3, H=10, resets=1.0),
    Case(T=3, I=3, H=10, lengths=(3, 2), padded=True, resets=0.0),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@every_backend
def test_against_nn_gru_sequence_by_sequence(backend, case):
    assert_not_wrong(case, backend)
    if backend in ("aten", "reference"):
        assert_not_wrong(case, backend, torch.float64)


@every_backend
def test_rule_of_padded_batches(backend):
    assert_right(Case(T=4, I=5, H=20, lengths=(4, 1, 3), padded=True, resets=0.3), backend)
    if backend == "sequence":
        for dtype in (torch.float16, torch.bfloat16):
            assert_not_wrong(CASES[4], backend, dtype)


def drawn(case, backend):
    layer, given, padding = draw(case, backend, torch.float32, torch.Generator().manual_seed(7))
    return dict(zip(("x", "h_0", "dy", "dh_n"), given, strict=True)) | padding, layer


def second(layer, x, h_0, dy, dh_n, lengths, resets):
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    results = layer(leaves[0], h_0, lengths=lengths, resets=resets)
    first = torch.autograd.grad(results, leaves, [dy.nan_to_num(0), dh_n], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@every_backend
def test_nothing_past_a_length_is_seen(backend):
    """The same bits, whatever lies there in x, dy and resets; zeros in output and the gradient of x."""
    given, layer = drawn(CASES[4], backend)
    past = torch.arange(CASES[4].T) >= given["lengths"][:, None]
    given["x"][past] = given["dy"][past] = 0
    found, of_second = run(layer, **given), second(layer, **given)
    given["x"][past], given["resets"][past] = math.inf, True
    given["dy"][past] = math.nan
    assert same_bits(found, run(layer, **given)) and same_bits(of_second, second(layer, **given))
    assert not found["output"][past].any() and not found["x"][past].any() and found["x"][~past].all()


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nothing_comes_through_a_reset(backend, value):
    """The state of another sequence, not even one that is not finite, nor its gradient."""
    given, layer = drawn(Case(T=4, B=2, I=3, H=9, bidirectional=True), backend)
    given["resets"] = torch.zeros(4, 2, dtype=torch.bool)
    given["resets"][2] = True
    true = run(layer, **given)
    for spoilt, other, of_h_0 in ((slice(0, 2), slice(2, 4), 0), (slice(2, 4), slice(0, 2), 1)):
        x, h_0, dy, dh_n = (given[name].clone() for name in ("x", "h_0", "dy", "dh_n"))
        x[spoilt], h_0[of_h_0], dy[spoilt], dh_n[1 - of_h_0] = value, value, value, value
        found = run(layer, x, h_0, dy, dh_n, resets=given["resets"])
        assert found["output"][spoilt].isnan().all() or found["x"][spoilt].isnan().all()
        for name, part in (("output", other), ("x", other), ("h_n", of_h_0), ("h_0", 1 - of_h_0)):
            assert torch.equal(found[name][part], true[name][part]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_changed_after_the_call_changes_no_gradient(backend):
    given, layer = drawn(CASES[5], backend)
    expected = run(layer, **given)
    x = given["x"].requires_grad_()
    output, h_n = layer(x, given["h_0"], lengths=given["lengths"], resets=given["resets"])
    given["resets"].fill_(True)
    given["lengths"].fill_(1)
    torch.autograd.backward([output, h_n], [given["dy"], given["dh_n"]])
    assert torch.equal(x.grad, expected["x"])


@every_backend
def test_equal_to_packing_unbatched_and_to_lengths_of_any_integers(backend):
    given, layer = drawn(CASES[0], backend)
    x, h_0, lengths = given["x"], given["h_0"], given["lengths"]
    output, h_n = layer(x, h_0, lengths=lengths)
    packed, h_n_of_packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), h_0)
    assert_close(output, pad_packed_sequence(packed, total_length=CASES[0].T)[0])
    assert_close(h_n, h_n_of_packed)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert same_bits(layer(x, h_0, lengths=lengths.to(dtype)), (output, h_n))
    resets = randn(CASES[0].T, 1) > 0
    of_batch = layer(x[:, 2:], h_0[:, 2:], lengths=lengths[2:], resets=resets)
    alone = layer(x[:, 2], h_0[:, 2], lengths=lengths[2], resets=resets[:, 0])
    assert same_bits(alone, [t[:, 0] for t in of_batch])
