"""One step in inference: after the first call of its kind, one launch a layer with the arguments of the long way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import tritongru
from tritongru import one_step

pytestmark = pytest.mark.compiled

B, I, H = 4, 8, 16


class Handed:
    """Where launches stop; by name what the kernel was handed at each."""

    def __init__(self, stand_in: Any, names: list[str]):
        stand_in.run.launch = self._launch
        self.names, self.launches = names, []

    def _launch(self, *given: Any) -> None:
        arguments = given[-1] if isinstance(given[-1], tuple) else given[-len(self.names) :]
        self.launches.append(dict(zip(self.names, arguments, strict=True)))


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Handed]:
    """A GPU's host without a GPU: tensors of the CPU go the way of a GPU's, nothing is launched."""
    from benchmarks.hostcost import as_on_a_gpu
    from tritongru.kernels import step as kernels
    from tritongru.launch import runtime

    with monkeypatch.context() as patch, as_on_a_gpu() as stand_in:
        patch.setattr(runtime, "_observers", [])  # who is told of launches goes the long way
        yield Handed(stand_in, kernels.step_forward.arg_names)


def cell(**options: Any) -> tritongru.GRUCell:
    return tritongru.GRUCell(I, H, backend="step", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_is_handed_over_as_the_long_way_does(bias: bool, dtype: torch.dtype, handed: Handed) -> None:
    module = cell(bias=bias, dtype=dtype)
    x, h = torch.randn(2, B, I, dtype=dtype), torch.randn(2, B, H, dtype=dtype)
    with torch.no_grad():
        found = [module(x[t], h[t]) for t in (0, 1)]
    assert len(handed.launches) == 2 and len(one_step._known) == 1
    first, second = handed.launches
    b_ih, b_hh = (module.bias_ih, module.bias_hh) if bias else (module.weight_hh, module.weight_hh)
    own = {
        "x_ptr": x[1], "h_ptr": h[1], "state_ptr": h[1], "w_ih_ptr": module.weight_ih, "w_hh_ptr": module.weight_hh,
        "b_ih_ptr": b_ih, "b_hh_ptr": b_hh, "y_ptr": found[1], "h_n_ptr": found[1], "rzn_ptr": found[1],
        "q_ptr": found[1], "w_ih_reverse_ptr": module.weight_ih, "w_hh_reverse_ptr": module.weight_hh,
        "b_ih_reverse_ptr": b_ih, "b_hh_reverse_ptr": b_hh,
    }  # fmt: skip
    assert {name: second[name] for name in own} == {name: tensor.data_ptr() for name, tensor in own.items()}
    others = handed.names[:9] + [name for name in handed.names[9:] if not name.endswith("_ptr")]
    assert {name: second[name] for name in others} == {name: first[name] for name in others}
    assert found[1].shape == (B, H) and found[1].dtype == dtype and not found[1].requires_grad


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_gru_takes_a_launch_a_layer(layers: int, batch_first: bool, handed: Handed) -> None:
    module = tritongru.GRU(I, H, layers, batch_first=batch_first, backend="step").eval()
    x = torch.randn(B, 1, I) if batch_first else torch.randn(1, B, I)
    h_0 = torch.randn(layers, B, H)
    with torch.no_grad():
        long, short = module(x, h_0), module(x, h_0)
    assert len(handed.launches) == 2 * layers and len(one_step._known) == 1
    y, h_n = short
    assert [t.shape for t in short] == [t.shape for t in long] and y.data_ptr() != h_n.data_ptr()
    launches = handed.launches[layers:]
    assert [launch["h_ptr"] for launch in launches] == [h.data_ptr() for h in h_0]
    assert [launch["h_n_ptr"] for launch in launches] == [h.data_ptr() for h in h_n]
    assert launches[0]["x_ptr"] == x.data_ptr() and launches[-1]["y_ptr"] == y.data_ptr()
    assert [launch["x_ptr"] for launch in launches[1:]] == [launch["y_ptr"] for launch in launches[:-1]]
    weights = [getattr(module, f"weight_hh_l{layer}").data_ptr() for layer in range(layers)]
    assert [launch["w_hh_ptr"] for launch in launches] == weights


@pytest.mark.parametrize(
    ("x", "h", "around"),
    [
        pytest.param(torch.randn(B + 1, I), torch.randn(B + 1, H), nullcontext, id="another batch"),
        pytest.param(torch.randn(I, B).T, torch.randn(B, H), nullcontext, id="other strides"),
        pytest.param(torch.randn(B, I), torch.randn(H, B).T, nullcontext, id="a state to be copied"),
        pytest.param(torch.randn(B * I + 1)[1:].view(B, I), torch.randn(B, H), nullcontext, id="not aligned"),
        pytest.param(torch.randn(B, I), torch.randn(B, H), torch.enable_grad, id="with gradients"),
        pytest.param(torch.randn(B, I), torch.randn(B, H), lambda: torch.autocast("cpu"), id="under autocast"),
        pytest.param(
            torch.randn(B, I), torch.randn(B, H), lambda: tritongru.use_backend("reference"), id="another backend"
        ),
    ],
)
def test_another_call_goes_the_long_way(x: Any, h: Any, around: Any, handed: Handed, monkeypatch) -> None:
    module = tritongru.GRUCell(I, H)
    with torch.no_grad(), tritongru.use_backend("step"):
        for _ in range(2):
            module(torch.randn(B, I), torch.randn(B, H))
    seen = []
    settle = tritongru.functional._settle
    monkeypatch.setattr("tritongru.functional._settle", lambda *a, **k: seen.append(1) or settle(*a, **k))
    with torch.no_grad(), tritongru.use_backend("step"), around():
        found = module(x, h)
    assert seen and found.shape == h.shape


def test_a_state_that_is_its_own_input_is_not_remembered(handed: Handed) -> None:
    """By one tensor in two places nobody could tell which of them a later call's is."""
    module = tritongru.GRUCell(H, H, backend="step")
    same = torch.randn(1, B, H)
    weights = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_ih]
    with torch.no_grad():
        for bias in (module.bias_ih, module.bias_hh):
            tritongru.gru_cell(same[0], same[0], *weights[:3], bias, backend="step")
            tritongru.gru_cell(same[0], torch.randn(B, H), *weights[:3], bias, backend="step")
    assert handed.launches[-1]["b_hh_ptr"] == module.bias_hh.data_ptr() != handed.launches[-1]["b_ih_ptr"]
    assert handed.launches[-1]["h_ptr"] != handed.launches[-1]["x_ptr"]


def test_who_watches_launches_is_told(handed: Handed) -> None:
    from tritongru.launch.runtime import observe

    module, names = cell(), []
    with torch.no_grad():
        for _ in range(2):
            module(torch.randn(B, I), torch.randn(B, H))
        with observe(lambda name, grid: names.append(name)):
            module(torch.randn(B, I), torch.randn(B, H))
    assert names == ["step_forward"]


def test_what_is_remembered_is_bounded(handed: Handed, monkeypatch) -> None:
    monkeypatch.setattr(one_step, "LIMIT", 3)
    module = cell()
    with torch.no_grad():
        for rows in range(1, 8):
            for _ in range(2):
                module(torch.randn(rows, I), torch.randn(rows, H))
            assert 1 <= len(one_step._known) <= 3
