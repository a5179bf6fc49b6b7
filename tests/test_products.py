"""The library products around the recurrence: column sums, and the precision that PyTorch's RNNs have."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from tests.kit.modules import randn
from tests.kit.operators import Seen
from tritongru import products
from tritongru.products import column_sums, rnn_precision, surroundings


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128, 129, 255, 256, 1000, 4097, 16384, 16385, 40000])
def test_column_sums(rows):
    """Of bfloat16 in float32, whose partial sums are not rounded: exact where they fit float32. And no sum has so many
    rows that PyTorch's CUDA kernel may take a buffer: from 256 values a thread on (max_values_per_thread of
    aten/src/ATen/native/cuda/Reduce.cuh)."""
    torch.manual_seed(0)
    values = torch.randint(-8, 9, (rows, 6)).to(torch.bfloat16)
    with Seen() as seen:
        found = column_sums(values, torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), values.double().sum(0))
    lengths = [args[0].shape[args[1][0]] for name, args in seen.calls if name.startswith("aten.sum.")]
    assert lengths and max(lengths) < 256


# TF32 follows the switch of PyTorch's RNNs.


@pytest.fixture
def switches():
    """torch's float32 precision switches, put back afterwards."""
    backends = torch.backends
    places = (backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    yield backends
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


def test_tf32_follows_the_rnn_switch_and_not_matmul_s(switches):
    """The default on NVIDIA alone; by allow_tf32 and by the general switch as well."""
    assert rnn_precision(True) == "tf32" and rnn_precision(False) == "ieee"
    for ours in ("ieee", "tf32"):
        switches.cudnn.rnn.fp32_precision = ours
        for matmul in ("tf32", "ieee"):
            switches.cuda.matmul.fp32_precision = matmul
            assert rnn_precision(True) == ours and rnn_precision(False) == "ieee"
    for allowed, expected in ((False, "ieee"), (True, "tf32")):
        switches.cudnn.allow_tf32 = allowed
        assert rnn_precision(True) == expected
    switches.cudnn.rnn.fp32_precision = "none"
    for general in ("ieee", "tf32"):
        switches.fp32_precision = general
        assert rnn_precision(True) == general


def on(device, dtype):
    """Stands for a tensor, of which `surroundings` reads device and dtype."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


ON_CUDA = on("cuda", torch.float32)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("matmul", ["tf32", "ieee"])
def test_products_run_in_the_given_precision_and_restore_matmul_s(switches, precision, matmul):
    """Where it says something; and a switch that follows the general one goes on following it."""
    switches.cuda.matmul.fp32_precision = matmul
    with surroundings(ON_CUDA, precision):
        assert switches.cuda.matmul.fp32_precision == precision
    assert switches.cuda.matmul.fp32_precision == matmul
    with pytest.raises(ZeroDivisionError), surroundings(ON_CUDA, precision):
        raise ZeroDivisionError
    assert switches.cuda.matmul.fp32_precision == matmul
    for tensor in (on("cuda", torch.bfloat16), on("cpu", torch.float32)):
        with surroundings(tensor, precision):
            assert switches.cuda.matmul.fp32_precision == matmul
    switches.cuda.matmul.fp32_precision = "none"
    for general in ("tf32", "ieee"):
        switches.fp32_precision = general
        assert switches.cuda.matmul.fp32_precision == general
        with surroundings(ON_CUDA, precision):
            pass


def test_products_switch_autocast_off():
    with torch.autocast("cpu", torch.bfloat16), surroundings(randn(2, 2), "ieee"):
        assert (randn(2, 2) @ randn(2, 2)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_matmuls_switch_survives_two_threads(monkeypatch):
    """The first call inside turns it, the last one turns it back, whichever order they leave in."""

    class Matmul:
        fp32_precision = "none"

    monkeypatch.setattr(products, "_matmul", Matmul)
    first, second = ExitStack(), ExitStack()
    for thread in (first, second):
        thread.enter_context(surroundings(ON_CUDA, "tf32"))
    first.close()
    assert Matmul.fp32_precision == "tf32"
    second.close()
    assert Matmul.fp32_precision == "none"
