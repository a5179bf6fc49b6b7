"""torch.nn.GRU and ours side by side: modules of the same parameters, inputs from seeds, and when results are the same.

Values in float32 agree within 32 * eps * sqrt(K) times the larger of 1 and the largest expected element, where
K = I + H + T * B bounds the length of every product behind an output or a gradient.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import tritongru

EPS = torch.finfo(torch.float32).eps


STEP = pytest.param("step", marks=pytest.mark.interpreted)


SEQUENCE = pytest.param("sequence", marks=pytest.mark.interpreted)


BACKENDS = ["aten", "reference", STEP, SEQUENCE]


OURS = ["reference", STEP, SEQUENCE]  # the backends that are not PyTorch's own path


ours_only = pytest.mark.parametrize("backend", OURS)


def pair(backend, *sizes, seed=0, recompute=False, **options):
    """torch.nn.GRU and tritongru.GRU with the same parameters."""
    torch.manual_seed(seed)
    theirs = nn.GRU(*sizes, **options)
    ours = tritongru.GRU(*sizes, **options, backend=backend, recompute=recompute)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def randn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(module):
    return module.num_layers * (2 if module.bidirectional else 1)


def packed(*lengths, input_size=3):
    return pack_sequence([randn(n, input_size, seed=n) for n in lengths], enforce_sorted=False)


def assert_close(actual, expected, terms=16, what=""):
    """Within the tolerance of this file's docstring; `terms` is its K, 16 for T 3, B 2, I 3, H up to 7."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=32 * EPS * math.sqrt(terms) * scale, msg=lambda m: f"{what}: {m}"
    )


def assert_all_close(actual, expected):
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), index
        if a is not None:
            assert_close(a, e, what=f"tensor {index}")


def both(theirs, ours, call):
    """`call(module)` gives tensors: those of ours are those of torch's."""
    expected, actual = call(theirs), call(ours)
    assert_all_close(actual, expected)
    return actual


def loss_of(output, h_n):
    """A scalar that weighs every element of both differently."""
    data = output.data if isinstance(output, PackedSequence) else output
    return (data * randn(*data.shape, seed=5)).sum() + (h_n * randn(*h_n.shape, seed=6)).sum()


def trained(module, x, hx=None):
    """Output, h_n and the gradient of each parameter after one backward pass."""
    module.zero_grad()
    output, h_n = module(x, hx)
    loss_of(output, h_n).backward()
    data = output.data if isinstance(output, PackedSequence) else output
    return [data, h_n, *(p.grad for p in module.parameters())]
