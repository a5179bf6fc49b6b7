"""`python -m tritongru check`: is it right here? Every backend and dtype against float64, beside nn.GRU's own error.

The rule, per tensor (output, h_n, and the gradients of x, h_0 and every weight): the RMS error over all elements of at
least 8 draws and 256 elements, as a fraction of the RMS of the truth, must be at most

    max(1.5 x the same figure of torch.nn.GRU in that dtype on that device, floor)
    floor = 2 u + sqrt(R) 2^-24

u is the unit roundoff of the dtype (eps / 2), 2^-11 for float32 whose products run as TF32. 2 u = sqrt(4) u is the RMS
sum of the four roundings on the way to any tensor (of x_proj, h, gates and gate gradients): where every term of a sum
is rounded, the error is as large a part of the sum as of a term. Products accumulate in float32, whose R roundings of
relative size 2^-24 add up to sqrt(R) of one as independent errors do; R is the length of the longest sum behind the
tensor: I + H for output and h_n, 3H + H for the gradients of x and h_0, T B for those of weights and biases, each with
the length of what it is computed from added. The truth is torch.nn.GRU in float64 on the CPU, from the same inputs.
"""

import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .. import registry
from ..batch import Visits
from ..launch.protocol import LayerCall
from ..module import GRU
from ..products import rnn_precision
from .files import show


@dataclass(frozen=True)
class Case:
    """A shape to check. With `lengths` the batch is packed (unsorted), and B and T follow from them; with `padded` they
    are the layer's argument, x is NaN past them, and B follows. `resets`: the probability that a step begins anew."""

    T: int = 5
    B: int = 3
    I: int = 7
    H: int = 20
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] = ()
    recompute: bool = False
    padded: bool = False
    resets: float | None = None

    @property
    def packed(self) -> bool:
        return bool(self.lengths) and not self.padded

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, B, D, of a packed batch too."""
        return max(self.lengths) if self.packed else self.T, len(self.lengths) or self.B, 1 + self.bidirectional

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.I, self.H, self.layers, self.bias, self.batch_first and not self.packed, 0.0, self.bidirectional

    @property
    def draws(self) -> int:
        """How many draws give every tensor its 256 elements; an RMS figure of fewer scatters beyond the rule's 1.5."""
        T, B, D = self.sizes
        return max(8, math.ceil(256 / min(T * B * self.I, B * self.H * D * self.layers, 3 * self.H)))

    @property
    def name(self) -> str:
        others = [(f.name, getattr(self, f.name)) for f in fields(self)[4:] if getattr(self, f.name) != f.default]
        marks = [name if value is True else f"{name}={value}" for name, value in others]
        return "-".join([f"T{self.T}-B{self.B}-I{self.I}-H{self.H}", *marks])


CASES = (
    Case(),
    Case(T=1, B=2, I=5, H=33),
    Case(T=6, B=17, I=40, H=48, bidirectional=True, batch_first=True),
    Case(T=4, B=3, I=9, H=67, layers=2),
    Case(I=11, H=24, bidirectional=True, lengths=(3, 5, 1, 4)),
    Case(T=7, B=5, I=16, H=32, bias=False, recompute=True),
    Case(T=3, B=9, I=16, H=128),
)
RESULTS = ("output", "h_n")  # the other tensors are gradients


class Figures(NamedTuple):
    """RMS errors of one tensor over the draws, and the largest absolute difference to nn.GRU."""

    error: float
    error_of_nn_gru: float
    floor: float
    difference: float

    @property
    def holds(self) -> bool:
        return self.error <= max(1.5 * self.error_of_nn_gru, self.floor)  # False for NaN


def floor(tensor: str, case: Case, dtype: torch.dtype, tf32: bool) -> float:
    """The floor of the rule, as the module's docstring derives it."""
    T, B, D = case.sizes
    R = max(case.I, case.H * D if case.layers > 1 else 0) + case.H
    if tensor not in RESULTS:
        R += 4 * case.H + (T * B if tensor not in ("x", "h_0") else 0)
    u = 2.0**-11 if tf32 and dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return 4 * math.sqrt(R) * u if dtype == torch.float64 else 2 * u + math.sqrt(R) * 2.0**-24


def run(module: nn.GRU, x: Any, h_0: Tensor, dy: Tensor, dh_n: Tensor, **padding: Tensor) -> dict[str, Tensor]:
    """Output, h_n and every gradient of one call of `module`, under random cotangents on both results. padding: lengths
    and resets."""
    packed = isinstance(x, PackedSequence)
    leaf, h_0 = (t.detach().clone().requires_grad_() for t in (x.data if packed else x, h_0))
    module.zero_grad()
    output, h_n = module(x._replace(data=leaf) if packed else leaf, h_0, **padding)
    output = output.data if packed else output
    torch.autograd.backward([output, h_n], [dy, dh_n])
    results = {"output": output, "h_n": h_n, "x": leaf.grad, "h_0": h_0.grad}
    results |= {name: p.grad for name, p in module.named_parameters()}
    return {name: t.detach().cpu() for name, t in results.items() if t is not None}


def measure(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device, draws: int | None = None, seed: int = 0
) -> dict[str, Figures]:
    """Figures of every tensor of a case, over `draws` draws (None: the rule's) of weights, inputs and cotangents."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[dict[str, Tensor]]] = []
    # nn.GRU knows no lengths and resets: there PyTorch's own path, sequence by sequence.
    of_torch = partial(GRU, backend="aten") if case.padded or case.resets is not None else nn.GRU
    for _ in range(draws or case.draws):
        layer, given, padding = draw(case, backend, dtype, generator)
        drawn.append([])
        for make, where, kind in ((None, device, dtype), (of_torch, device, dtype), (of_torch, "cpu", torch.float64)):
            module = layer.to(device) if make is None else make(*case.shape, device=where, dtype=kind)
            module.load_state_dict(layer.state_dict())
            how = {name: t.to(where) for name, t in padding.items()}
            drawn[-1].append(run(module, *(t.to(device=where, dtype=kind) for t in given), **how))
    tf32, found = _precision(case, backend, device) == "tf32", {}
    for name in drawn[0][2]:
        ours, theirs, truth = (torch.stack([of[i][name].double() for of in drawn]) for i in range(3))
        mine, of_nn_gru = (_relative((each - truth).norm().item(), truth.norm().item()) for each in (ours, theirs))
        found[name] = Figures(mine, of_nn_gru, floor(name, case, dtype, tf32), (ours - theirs).abs().max().item())
    return found


def _precision(case: Case, backend: str, device: torch.device) -> str | None:
    """Of float32 products: one program that holds a small layer computes them by FMA, as cuDNN does there."""
    found, (T, B, D), described = registry.find(backend), case.sizes, registry.device_of(device)
    precision = rnn_precision(described.vendor == "nvidia")
    if found.module is None:
        return precision
    call = LayerCall(Visits(T, B), D, case.H, "fp32", precision, described, True, found.overrides)
    return found.load().product_precision(call)


def _relative(error: float, truth: float) -> float:
    """A truth of zeros, as where every step is a reset, allows no error."""
    return error / truth if truth else math.inf * error if error else 0.0


def draw(
    case: Case, backend: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[GRU, tuple[Any, ...], dict[str, Tensor]]:
    """On the CPU, a layer and arguments of `run`: x, h_0, dy, dh_n, and padding."""
    T, B, D = case.sizes

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    layer = GRU(*case.shape, device="cpu", dtype=dtype, backend=backend, recompute=case.recompute)
    with torch.no_grad():
        for p in layer.parameters():  # nn.GRU's own scale, from this generator
            uniform = torch.rand(p.shape, generator=generator, dtype=torch.float64, device="cpu")
            p.copy_((uniform * 2 - 1) / math.sqrt(case.H))
    padding: dict[str, Tensor] = {}
    if case.packed:
        x: Any = pack_padded_sequence(normal(T, B, case.I), list(case.lengths), enforce_sorted=False)
        dy = normal(len(x.data), D * case.H)
    else:
        leading = (B, T) if case.batch_first else (T, B)
        x, dy = normal(*leading, case.I), normal(*leading, D * case.H)
        if case.lengths:
            padding["lengths"] = torch.tensor(case.lengths, device="cpu")
            past = torch.arange(T, device="cpu") >= padding["lengths"][:, None]
            (x if case.batch_first else x.transpose(0, 1))[past] = math.nan
        if case.resets is not None:
            padding["resets"] = torch.rand(*leading, generator=generator, device="cpu") < case.resets
    h_0, dh_n = normal(case.layers * D, B, case.H), normal(case.layers * D, B, case.H)
    return layer, (x, h_0, dy, dh_n), padding


def _why_not(backend: registry.Backend, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend cannot run all of the cases in a dtype; None if it can."""
    x, case = torch.empty(0, dtype=dtype, device=device), max(CASES, key=lambda case: case.H)
    return backend.why_not(device, dtype) or backend.too_large(x, case.sizes[1], case.H, case.sizes[2], True)


def main() -> int:
    """Print the table; 0 if the rule holds everywhere and a Triton kernel was reached."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, kernels emulated"
    print(f"tritongru check on {where}; torch {torch.__version__}, {len(CASES)} cases")
    todo = []
    for backend, (dtype, dtype_name) in product(registry.BACKENDS.values(), registry.DTYPES.items()):
        if dtype == torch.float64 and (backend.triton or device.type == "cuda"):
            continue  # no kernel's, or the truth itself
        forms = [(f"{backend.name}, {what}", f"{backend.name}:{fields}") for fields, what in backend.forms]
        for name, form in forms or [(backend.name, backend.name)]:
            if why_not := _why_not(registry.find(form), dtype, device):
                print(f"{name} does not run in {dtype_name}: {why_not}")
            else:
                todo.append((name, form, dtype, dtype_name))
    launches: list[str] = []
    lines, broken = [], []
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "RNN module weights are not part")  # nn.GRU's own, of every bfloat16 layer
        if registry.has_triton():
            from ..launch.runtime import observe

            stack.enter_context(observe(lambda name, grid: launches.append(name)))
        for name, form, dtype, dtype_name in track(todo, "checking", transient=True):
            found = [(f, case, of) for case in CASES for of, f in measure(case, form, dtype, device).items()]
            output = max((f for f, _, of in found if of in RESULTS), key=lambda f: f.error)
            gradient, _, worst = max((each for each in found if each[2] not in RESULTS), key=lambda each: each[0].error)
            wrong = [
                f"BROKEN {name} {dtype_name} {case.name} {of}: "
                f"{f.error:.2e} > max(1.5 x {f.error_of_nn_gru:.2e}, {f.floor:.2e})"
                for f, case, of in found
                if not f.holds
            ]
            errors = (f"{f.error:.1e} ({f.error_of_nn_gru:.1e})" for f in (output, gradient))
            difference = max(f.difference for f, _, _ in found)
            lines.append((name, dtype_name, *errors, worst, f"{difference:.1e}", "BROKEN" if wrong else "holds"))
            broken += wrong
    title = "RMS error against float64 (nn.GRU's own in brackets) and largest plain difference, worst case"
    header = ("backend", "dtype", "output", "gradients", "worst of", "|difference| to nn.GRU", "rule")
    show(title, header, lines, names=2)
    print(*broken, sep="\n", end="\n" * bool(broken))
    print(f"{len(launches)} Triton kernel launches" if launches else "no Triton kernel was reached")
    return 0 if launches and not broken else 1
