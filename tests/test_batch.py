"""What the host is told of time steps: against the rule read one visit at a time, and what keeping it costs."""

import gc
import sys
import tracemalloc
from collections import deque

import pytest
import torch

from tritongru.batch import Visits, kept

BATCHES = {
    "dense": Visits(5, 3),
    "one step": Visits(1, 4),
    "two steps": Visits(2, 1),
    "packed": Visits(5, 4, (4, 4, 2, 1, 1)),
    "packed, one step": Visits(1, 3, (3,)),
    "packed, two steps": Visits(2, 3, (3, 1)),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("visits", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("D", [1, 2])
def test_launches_are_told_at_and_rows(visits, D):
    """FORWARD_SCALARS and BACKWARD_SCALARS of kernels/step.py, by `at` and `rows`."""
    T, directions, absent = visits.time, range(D), 2 - D
    forward = [
        (
            max(visits.rows(d, v) for d in directions),
            (
                v % 2,
                *(n for d in directions for n in (visits.at(d, v), *(visits.rows(d, w) for w in (v, v - 1, v + 1)))),
            )
            + (0,) * 4 * absent,
        )
        for v in range(T)
    ]
    assert list(visits.forward(D)) == forward
    backward = [
        (
            max(visits.rows(d, w) for d in directions for w in (v, v - 1)),
            tuple(of(d, w) for d in directions for of in (visits.at, visits.rows) for w in (v, v - 1, v - 2))
            + (0,) * 6 * absent,
        )
        for v in reversed(range(T))
    ]
    assert list(visits.backward(D, want_dh_0=True)) == backward
    assert list(visits.backward(D, want_dh_0=False)) == (backward[:-1] or backward)


@pytest.mark.parametrize("visits", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("direction", [0, 1])
def test_h_prev_is_the_state_of_the_visit_before(visits, direction):
    """Of y's rows, numbered, and h_0's, numbered on."""
    N, B = visits.size_rows, visits.batch
    y, h_0 = torch.arange(N).view(N, 1), torch.arange(N, N + B).view(B, 1)
    expected = torch.empty(N, dtype=torch.int64)
    for visit in range(visits.time):
        for row in range(visits.rows(direction, visit)):
            start, before = (visits.at(direction, v) * visits.stride_row for v in (visit, visit - 1))
            expected[start + row] = before + row if row < visits.rows(direction, visit - 1) else N + row
    found = torch.full((N,), -1)
    for rows, h in visits.h_prev(y, h_0, direction):
        found[rows] = h[:, 0]
    assert torch.equal(found, expected)


def traced(work):
    """Bytes of Python's objects that `work` leaves behind, and the most that there are while it runs."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_nothing_is_kept_of_a_pass(packed):
    """And while it runs, 200 bytes a step at most: there may be 100,000 of them."""
    T = 20_000

    def passes():
        for B in (3, 4):
            visits = Visits(T, B, (B,) * (T - 1) + (1,) if packed else None)
            deque(visits.forward(2), maxlen=0)
            deque(visits.backward(2, True), maxlen=0)

    left, most = traced(passes)
    assert left < 10_000 and most < 200 * T


@pytest.mark.parametrize("T, shapes", [(20_000, 40), (4, 6000)], ids=["long", "many"])
def test_tables_of_packed_batches_are_a_few_mebibytes_in_all(T, shapes):
    """On the host and on the device together; the last one is there when it is asked for again."""
    kept.clear()

    def calls():
        for shape in range(shapes):
            table, _ = Visits(T, shape + 1, (shape + 1,) * (T - 1) + (1,)).tables(CPU)
        again, _ = Visits(T, shape + 1, (shape + 1,) * (T - 1) + (1,)).tables(CPU)
        assert again.data_ptr() == table.data_ptr()

    on_host, _ = traced(calls)
    tables = list(kept._found.values())
    assert 0 < len(tables) < shapes
    assert on_host + sum(table.nbytes for table in tables) < 5 << 20


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_step_runs_no_python_of_ours(packed):
    """What the host does per step is its launch: numbers come by zip, from sequences that are there."""

    def calls(T):
        visits = Visits(T, 3, (3,) * (T - 1) + (1,) if packed else None)
        made = []
        sys.setprofile(lambda frame, event, argument: made.append(frame.f_code.co_name) if event == "call" else None)
        try:
            for D in (1, 2):
                deque(visits.forward(D), maxlen=0)
                deque(visits.backward(D, True), maxlen=0)
        finally:
            sys.setprofile(None)
        return made

    assert calls(1000) == calls(10)
