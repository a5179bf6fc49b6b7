"""Calls between graphs. After a graph break Dynamo compiles each Python function that is called by itself: ours again
for every size and flag of a model's layers, up to its recompile limit. (nn.GRU is C++ there.)"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from torch._C._dynamo.eval_frame import set_eval_frame  # of torch's C extension: Dynamo itself is not imported
from torch.utils._contextlib import context_decorator

F = TypeVar("F", bound=Callable[..., Any])


class _WithoutDynamo:
    __slots__ = ("callback",)

    def __enter__(self) -> None:
        self.callback = set_eval_frame(None)

    def __exit__(self, *_: object) -> None:
        set_eval_frame(self.callback)


def eager_beside_graphs(function: F) -> F:
    """`function`, run without Dynamo when Python calls it; traced where Dynamo traces its caller or was given it."""
    decorated: Any = context_decorator(partial(_WithoutDynamo), function)
    decorated.__defaults__ = function.__defaults__  # a trace's guards look for them here
    decorated.__kwdefaults__ = function.__kwdefaults__
    decorated._torchdynamo_inline = function  # what a trace takes in its place
    return cast(F, decorated)
