"""torch.func's transforms and forward-mode differentiation inside a compiled function, and around one: PyTorch's own
path runs, as in eager calls, for the operators of tritongru/ops.py have no such derivatives. The tolerance is that of
tests/kit/modules.py.
"""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.fx.experimental.proxy_tensor import make_fx

import tritongru
from tests.kit.modules import assert_all_close, ours_only, pair, randn, states
from tests.kit.operators import DEFAULT_TOO
from tritongru.registry import BACKENDS

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

LONG, INTERPRETED = pytest.mark.long, pytest.mark.interpreted
# As DEFAULT_TOO, for what takes long and goes PyTorch's own path whichever backend is asked for.
ONE_QUICK = pytest.mark.parametrize(
    "backend",
    [None, *(pytest.param(name, marks=(LONG, INTERPRETED) if of.triton else LONG) for name, of in BACKENDS.items())],
    ids=lambda backend: backend or "default",
)


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def squares(f):
    return lambda x: f(x).square().sum()


def pulled_back(output, pull_back):
    return pull_back(output)[0]


# Each takes a function of one tensor, where that tensor is, and a direction.
FORWARD_MODE = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "dual-level": dual,
    "hessian": lambda f, x, v: hessian(squares(f))(x),
}
REVERSE_MODE = {
    "grad": lambda f, x, v: grad(squares(f))(x),
    "vjp": lambda f, x, v: pulled_back(*vjp(f, x)),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "grad-of-grad": lambda f, x, v: grad(squares(grad(squares(f))))(x),
}
FORMS = FORWARD_MODE | REVERSE_MODE
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def some_of_each(f, x, v):
    """The ways through PyTorch that differ most, in one graph."""
    return [FORMS[name](f, x, v) for name in ("jvp", "dual-level", "grad")]


def of_torch_and_ours(backend, cell=False, **options):
    """torch.gru and tritongru.gru, or the cells, each as a function of the input alone; weights that want no gradient,
    for else autograd would refuse what it must not take for a constant."""
    if cell:
        theirs = nn.GRUCell(3, 4)
        weights, h_0 = [p.detach() for p in theirs.parameters()], randn(2, 4, seed=3)
        return (
            lambda x: torch.gru_cell(x, h_0, *weights),
            lambda x: tritongru.gru_cell(x, h_0, *weights, backend=backend),
        )
    theirs, _ = pair(None, 3, 4, **options)
    weights = [p.detach() for p in theirs.parameters()]
    h_0 = randn(states(theirs), 2, 4, seed=3)
    given = (h_0, weights, True, 1, 0.0, True, theirs.bidirectional, theirs.batch_first)
    return lambda x: torch.gru(x, *given)[0], lambda x: tritongru.gru(x, *given, backend=backend)[0]


SHAPES = {"plain": {}, "bi-batch-first": {"bidirectional": True, "batch_first": True}}
every_shape = pytest.mark.parametrize("shape", [*SHAPES, "cell"])


def shaped(backend, shape):
    """The two functions, and their input and a direction."""
    rows = {"plain": (3, 2, 3), "bi-batch-first": (2, 3, 3), "cell": (2, 3)}[shape]
    both = of_torch_and_ours(backend, shape == "cell", **SHAPES.get(shape, {}))
    return *both, randn(*rows), randn(*rows, seed=8)


@pytest.mark.parametrize("shape", ["bi-batch-first", "cell"])
@every_form
def test_every_derivative_inside_a_compiled_function(form, shape, dynamo, ran):
    theirs, ours, x, v = shaped("reference", shape)
    with dynamo.config.patch(allow_rnn=False):
        found = compiled(lambda x, v: form(ours, x, v))(x, v)
    assert_all_close([found], [form(theirs, x, v)])
    assert ran == []


@every_shape
@DEFAULT_TOO
def test_a_derivative_inside_a_compiled_function(backend, shape, dynamo, ran):
    theirs, ours, x, v = shaped(backend, shape)
    assert_all_close(compiled(lambda x, v: some_of_each(ours, x, v))(x, v), some_of_each(theirs, x, v))
    assert ran == []


@every_shape
@DEFAULT_TOO
def test_a_derivative_around_a_compiled_function(backend, shape, dynamo, ran):
    """Also where a graph with our operator has been made for the same arguments before. Under fullgraph=True
    Dynamo refuses it, whatever the function."""
    theirs, ours, x, v = shaped(backend, shape)
    function = torch.compile(ours, backend="aot_eager")
    assert_all_close([function(x)], [theirs(x)])
    by_operator = list(ran)
    assert set(ran) == {backend or ("aten" if shape == "cell" else "reference")} - {"aten"}
    assert_all_close(some_of_each(function, x, v), some_of_each(theirs, x, v))
    assert ran == by_operator
    assert_all_close([function(x)], [theirs(x)])


@pytest.mark.parametrize("allow_rnn", [True, False], ids=["full-graph", "broken-graph"])
@ONE_QUICK
def test_a_derivative_of_a_module_inside_a_compiled_function(backend, allow_rnn, dynamo, ran):
    theirs, ours = pair(backend, 3, 4, 2, bidirectional=True)

    def call(module):
        return lambda x, v: some_of_each(lambda x: module(x)[0], x, v)

    x, v = randn(3, 2, 3), randn(3, 2, 3, seed=8)
    with dynamo.config.patch(allow_rnn=allow_rnn):
        found = torch.compile(call(ours), backend="aot_eager", fullgraph=allow_rnn)(x, v)
    assert_all_close(found, call(theirs)(x, v))
    assert ran == []


@DEFAULT_TOO
def test_a_derivative_by_weights_inside_a_compiled_function(backend, dynamo, ran):
    """By those of a module, with functional_call, PyTorch 2.13 cannot compile it for nn.GRU either."""
    theirs, _ = pair(None, 3, 4)
    x, h_0, weights = randn(3, 2, 3), torch.zeros(1, 2, 4), [p.detach() for p in theirs.parameters()]
    directions = [randn(*p.shape, seed=8) for p in weights]

    def call(gru, **options):
        def loss(*weights):
            return gru(x, h_0, list(weights), True, 1, 0.0, True, False, False, **options)[0].square().sum()

        return lambda *weights: [
            *grad(loss, argnums=(0, 1, 2, 3))(*weights),
            jvp(loss, weights, tuple(directions))[1],
        ]

    assert_all_close(compiled(call(tritongru.gru, backend=backend))(*weights), call(torch.gru)(*weights))
    assert ran == []


@DEFAULT_TOO
def test_forward_mode_of_packed_rows_inside_a_compiled_function(backend, dynamo, ran):
    """By dual numbers, which break the graph at torch.gru; torch.func's transforms of packed rows PyTorch refuses,
    compiled or not."""
    theirs, _ = pair(None, 3, 4, bidirectional=True)
    weights, sizes, h_0 = [p.detach() for p in theirs.parameters()], torch.tensor([3, 2, 1]), randn(2, 3, 4, seed=3)
    given = (sizes, h_0, weights, True, 1, 0.0, True, True)

    def ours(x):
        return tritongru.gru(x, *given, backend=backend)[0]

    x, v = randn(6, 3), randn(6, 3, seed=8)
    expected = dual(lambda x: torch.gru(x, *given)[0], x, v)
    found = torch.compile(lambda x, v: dual(ours, x, v), backend="aot_eager")(x, v)
    assert_all_close([found], [expected])
    assert ran == []
    messages = []
    for function in (ours, torch.compile(ours, backend="aot_eager")):
        for form in (FORWARD_MODE["jvp"], REVERSE_MODE["grad"]):
            try:
                found = form(function, x, v)
            except RuntimeError as error:
                messages.append(str(error))
            else:  # a PyTorch that can
                assert_all_close([found], [form(lambda x: torch.gru(x, *given)[0], x, v)])
    assert len(messages) in (0, 4) and all("data pointer" in message for message in messages)


@pytest.mark.parametrize("shape", [*SHAPES, "cell", "packed"])
@ours_only
def test_vmap_inside_a_compiled_function(backend, shape, dynamo, ran):
    if shape == "packed":
        theirs, _ = pair(None, 3, 4)
        given = (torch.tensor([2, 1]), torch.zeros(1, 2, 4), [p.detach() for p in theirs.parameters()])

        def ours(x):
            return tritongru.gru(x, *given, True, 1, 0.0, True, False, backend=backend)[0]

        x = randn(3, 3)
    else:
        _, ours, x, _ = shaped(backend, shape)
    many = torch.stack([x, 2 * x])
    expected = torch.stack([ours(each) for each in many])
    ran.clear()
    assert_all_close([compiled(torch.vmap(ours))(many)], [expected])
    assert set(ran) == {backend}


def test_a_graph_made_before_says_that_it_has_no_forward_mode(dynamo):
    """make_fx's and AOTAutograd's know nothing of where they are called; a compiled function is made anew."""
    _, ours = of_torch_and_ours("reference")
    x, v = randn(3, 2, 3), randn(3, 2, 3, seed=8)
    graph = make_fx(ours)(x)
    assert torch.equal(graph(x), ours(x))
    for form in (FORWARD_MODE["jvp"], dual):
        for call in (partial(form, graph), compiled(lambda x, v, form=form: form(graph, x, v))):
            with pytest.raises(RuntimeError, match=r"layer_forward has no forward-mode derivative: make the graph"):
                call(x, v)
