"""Nothing outside a tensor is read into a result or written, and every element of a result is written."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import tritongru
from tests.kit.fences import call_between_fences, fences, poisoned, with_gaps

pytestmark = pytest.mark.interpreted


def poisoned_layer(**kwargs) -> tritongru.GRU:
    layer = tritongru.GRU(7, 19, backend="step", **kwargs)
    for p in layer.parameters():
        p.data = poisoned(p.data)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("tiles", ["one", "h200"])
def test_dense(T: int, dtype: torch.dtype, tiles: str, monkeypatch, request) -> None:
    if tiles == "h200":
        request.getfixturevalue("h200_tiles")
    torch.manual_seed(0)
    layer = poisoned_layer(bidirectional=True, dtype=dtype)
    x, h_0 = torch.randn(T, 18, 7, dtype=dtype), torch.randn(2, 18, 19, dtype=dtype)
    found = call_between_fences(layer, poisoned(x), poisoned(h_0), monkeypatch)
    assert all(t.isfinite().all() for t in found)
    gaps = call_between_fences(layer, with_gaps(x), with_gaps(h_0), monkeypatch)
    # only the library products may sum in another order: a few roundings to storage
    u = torch.finfo(dtype).eps / 2
    assert all((a - b).norm() <= 8 * u * b.norm() for a, b in zip(found, gaps, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_packed(recompute: bool, monkeypatch, h200_tiles: None) -> None:
    torch.manual_seed(0)
    layer = poisoned_layer(bidirectional=True, recompute=recompute)
    x = pack_padded_sequence(torch.randn(5, 18, 7), torch.tensor([5] + [1, 2, 3] * 5 + [4, 4]), enforce_sorted=False)
    found = call_between_fences(layer, x._replace(data=poisoned(x.data)), poisoned(torch.randn(2, 18, 19)), monkeypatch)
    assert all(t.isfinite().all() for t in found)


def test_a_fence_catches_a_store_outside(monkeypatch) -> None:
    """The fence itself: a launcher that writes one element too many is found."""
    from tritongru.launch import step

    with pytest.raises(AssertionError, match="beyond"), fences(monkeypatch):
        tensor = step.empty(4, dtype=torch.float32, device=torch.device("cpu"))
        tensor.as_strided((5,), (1,))[4] = 0.0
