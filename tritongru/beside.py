"""What is called where a graph broke: Dynamo would compile each Python function there by itself, ours anew for every
size and flag of a model's layers, until its limit of graphs for one function. nn.GRU's C++ it leaves alone."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
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
    """`function` traced where Dynamo traces its caller or was given it; called from Python, it runs without Dynamo.

    Dynamo compiles no frame of torch's context_decorator, but traces it when it is what torch.compile was given.
    """
    decorated: Any = context_decorator(partial(_WithoutDynamo), function)
    decorated.__defaults__ = function.__defaults__  # a trace's guards look for them here
    decorated.__kwdefaults__ = function.__kwdefaults__
    decorated._torchdynamo_inline = function  # what a trace takes in its place
    return cast(F, decorated)


def compile_call(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """nn.Module.compile. There the call begins in a frame of torch's own, which Dynamo of torch 2.11 and 2.13 leaves
    alone, and what it calls is beside any graph; here in one of ours."""
    call = module._call_impl
    module._compiled_call_impl = torch.compile(lambda *given, **named: call(*given, **named), *args, **kwargs)
