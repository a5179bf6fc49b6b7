"""The operators of a layer as tests call them, and what a graph or a dispatch mode sees of a layer."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .modules import EPS, randn

FORWARD, BACKWARD = "tritongru.layer_forward.default", "tritongru.layer_backward.default"


class Graphs(list):
    """A compiler backend that runs a graph as it is, and keeps what each one calls."""

    def __call__(self, graph, inputs):
        self.append(calls(graph.graph))
        return graph


SHAPES = {
    "dense": dict(T=3, B=2, I=3, H=5),
    "batch-first-bidirectional": dict(T=3, B=2, I=3, H=5, D=2, batch_first=True),
    "one-step-no-bias": dict(T=1, B=2, I=3, H=5, batch_first=True, bias=False),
    "one-row": dict(T=4, B=1, I=3, H=8, batch_first=True),
    "packed": dict(I=2, H=4, sizes=[3, 2, 1], D=2),
    "recompute": dict(T=3, B=2, I=3, H=5, recompute=True),
    "inference": dict(T=3, B=2, I=3, H=5, training=False),
    "half": dict(T=3, B=2, I=3, H=5, dtype=torch.bfloat16),
    "padded": dict(T=4, B=3, I=3, H=5, D=2, batch_first=True, lengths=[2, 1, 4], resets=0.4),
}


def arguments(
    backend, I, H, T=None, B=None, D=1, sizes=None, batch_first=False, bias=True, training=True, recompute=False,
    dtype=torch.float32, lengths=None, resets=None,
):  # fmt: skip
    """Of layer_forward. resets: the probability of one."""
    B = sizes[0] if sizes else B

    def leaf(*shape, seed):
        return (0.5 * randn(*shape, seed=seed)).to(dtype).requires_grad_(training)

    rows = (sum(sizes),) if sizes else (B, T) if batch_first else (T, B)
    weights = [
        leaf(*s, seed=10 * d + i)
        for d in range(D)
        for i, s in enumerate([(3 * H, I), (3 * H, H), (3 * H,), (3 * H,)][: 4 if bias else 2])
    ]
    batch_sizes = torch.tensor(sizes) if sizes else None
    x, h_0 = leaf(*rows, I, seed=7), leaf(D, B, H, seed=8)
    lengths = None if lengths is None else torch.tensor(lengths)
    resets = None if resets is None else randn(T, B, seed=6).abs() < resets
    return [x, h_0, weights, batch_sizes, backend, batch_first, training, recompute, lengths, resets]


def backward_arguments(given, results):
    """Of layer_backward, after layer_forward."""
    x, h_0, weights, batch_sizes, backend, batch_first, _, _, lengths, resets = given
    y, h_n, rzn, q = (t.detach() for t in results)
    dy, dh_n = (randn(*t.shape, seed=9).to(t.dtype) for t in (y, h_n))
    wanted = [True] * (2 + len(weights))
    return [dy, dh_n, x, h_0, y, rzn, q, weights, batch_sizes, backend, batch_first, wanted, lengths, resets]


def calls(graph):
    """What a graph calls, in order."""
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def runs(backend, by_default="reference"):
    """The backends that a graph on the CPU runs layers on."""
    return {backend or by_default} - {"aten"}


class Seen(TorchDispatchMode):
    """The operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def products(self):
        """Those that a kernel of a layer is made of: matrix products, and our own operators."""
        return [name for name in self.names if "mm" in name or "linear" in name or "tritongru" in name]


# Of a second derivative, relative to the largest element: as many roundings as in a first one (32 * sqrt(16), as
# there), and as many again of the first one, on which it rests.
SECOND = 2 * 32 * 4 * EPS


def assert_second(found, expected):
    """Second derivatives: those of PyTorch's own path on the CPU, which autograd differentiates to any order."""
    assert [f is None for f in found] == [e is None for e in expected]
    for index, (f, e) in enumerate(zip(found, expected, strict=True)):
        if f is not None:
            scale = max(1.0, e.abs().max().item())
            torch.testing.assert_close(f, e, rtol=0, atol=SECOND * scale, msg=lambda m, i=index: f"tensor {i}: {m}")
