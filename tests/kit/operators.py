"""The operators of a layer as tests call them, and what a graph or a dispatch mode sees of a layer."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .modules import PLAIN, Form, assert_all_close, randn

FORWARD, BACKWARD = "tritongru.layer_forward.default", "tritongru.layer_backward.default"


class Graphs(list):
    """A compiler backend that runs a graph as it is, and keeps what each one calls."""

    def __call__(self, graph, inputs):
        self.append(calls(graph.graph))
        return graph


BATCH_FIRST = {"batch_first": True}
SHAPES = {  # forms of one layer, and what `arguments` is told besides
    "dense": (PLAIN, {}),
    "batch-first-bidirectional": (Form(BATCH_FIRST | {"bidirectional": True}), {}),
    "one-step-no-bias": (Form(BATCH_FIRST | {"bias": False}, sizes=(1, 2)), {}),
    "one-row": (Form(BATCH_FIRST, sizes=(4, 1)), {}),
    "packed": (Form({"bidirectional": True}, lengths=(3, 2, 1)), {}),
    "recompute": (Form(recompute=True), {}),
    "inference": (PLAIN, {"training": False}),
    "half": (PLAIN, {"dtype": torch.bfloat16}),
    "padded": (Form(BATCH_FIRST | {"bidirectional": True}, sizes=(4, 3), resets=True), {}),
}


def arguments(layer, form, training=True, dtype=torch.float32):
    """Of layer_forward, as they are in a call of the layer."""
    (x, h_0), how = form.given(), form.how()
    x, batch_sizes = (x.data, x.batch_sizes) if form.lengths else (x, None)
    x, h_0 = (t.to(dtype).requires_grad_(training) for t in (x, h_0))
    weights = list(layer.to(dtype).requires_grad_(training).parameters())
    resets = how["resets"].T if how and layer.batch_first else how.get("resets")
    flags = layer.backend or "", layer.batch_first, training, form.recompute
    return [x, h_0, weights, batch_sizes, *flags, how.get("lengths"), resets]


def backward_arguments(given, results):
    """Of layer_backward, after layer_forward."""
    y, h_n, rzn, q = (t.detach() for t in results)
    dy, dh_n = (randn(*t.shape, seed=9).to(t.dtype) for t in (y, h_n))
    return [dy, dh_n, y, rzn, q, [True] * (2 + len(given[2])), *given]


def calls(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def runs(backend, by_default="reference"):
    """The backends that a graph on the CPU runs layers on."""
    return {backend or by_default} - {"aten"}


class Seen(TorchDispatchMode):
    """The operators that are called inside, and with what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return [name for name, _ in self.calls]

    def products(self):
        """Those that a kernel of a layer is made of: matrix products, and our own operators."""
        return [name for name in self.names if "mm" in name or "linear" in name or "tritongru" in name]


def assert_second(found, expected):
    """Second derivatives: the roundings of a first one, and as many again of the first one, on which they rest."""
    assert_all_close(found, expected, terms=2**2 * 16)
