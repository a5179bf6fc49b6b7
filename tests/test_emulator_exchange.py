"""A recurrence of programs that exchange (tests/kit/exchanging.py) under the emulator, and mutants of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from torch import Tensor

from tests.kit import exchanging
from tritongru.tools.emulator import Deadlock, OutOfBounds, emulating

pytestmark = pytest.mark.usefixtures("one_thread")

SENTINEL = -1


def exchanged(seed: int | None = None, dtype: torch.dtype = torch.bfloat16, kernels=None) -> list[Tensor]:
    """What the recurrence of tests/kit/exchanging.py gives: y, dh_0, and both in float64."""
    torch.manual_seed(0)
    H, B, T = 64, 5, 4
    w = (torch.randn(3, H, H) / H**0.5).to(dtype)
    h_0, dy = torch.randn(B, H).to(dtype), torch.randn(T, B, H).to(dtype)
    if seed is None:
        found = exchanging.run(w, h_0, dy, kernels=kernels)
    else:
        with emulating(seed):
            found = exchanging.run(w, h_0, dy, kernels=kernels)
    return [*found, *exchanging.truth(w, h_0, dy)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_recurrence_of_exchanging_programs(dtype: torch.dtype) -> None:
    """Right to the rounding of what is published, and the same bits under every interleaving."""
    y, dh_0, true_y, true_dh_0 = exchanged(dtype=dtype)
    eps = torch.finfo(dtype).eps
    for found, true in ((y, true_y), (dh_0, true_dh_0)):
        error = (found.double() - true).norm() / true.norm()
        assert 0 < error < eps / 2  # a rounding to nearest is at most eps / 2 of a value, and they do not add up
    for seed in range(4):
        again = exchanged(seed, dtype)
        assert torch.equal(again[0], y) and torch.equal(again[1], dh_0)


def broken(folder: Path, old: str, new: str) -> ModuleType:
    """tests/kit/exchanging.py with one piece of text replaced."""
    text = Path(exchanging.__file__).read_text()
    assert old in text, f"tests/kit/exchanging.py no longer holds {old!r}: this mutant tests nothing"
    name = f"broken_{folder.name.replace('-', '_')}"
    path = folder / f"{name}.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTANTS = {
    "nothing is published": (
        "        publish(e_ptr + here, h.to(dtype))\n        gl.store(y",
        "        gl.store(y",
        Deadlock,
    ),
    "half of the elements are published": (
        "gl.where(bits == -1, 0x7FC0, bits).to(gl.int16), cache",
        "bits, mask=pointers.to(gl.int64) % 4 == 0, cache",
        Deadlock,
    ),
    "a gate is published over another": ("publish(e_ptr + g * (ROWS * H) + here", "publish(e_ptr + here", Deadlock),
    "the step before is waited for": (
        "        e_ptr += ROWS * H\n        publish(",
        "        publish(ROWS * H + ",
        None,
    ),
    "no wait": (
        """        seen = gl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, [base, (row_k * H + k) * 2], dtype=gl.int16, is_pure=False, pack=PACK
        )
""",
        "        seen = gl.load(e_ptr + row_k * H + k)\n",
        None,
    ),
    "rows past the batch are stored": ("h.to(dtype), mask=mask)", "h.to(dtype))", OutOfBounds),
    "rows past the batch are loaded": (
        "gl.load(h_0_ptr + here, mask=mask, other=0.0)",
        "gl.load(h_0_ptr + here)",
        OutOfBounds,
    ),
    "a part is left out of the sum": ("gl.sum(shared.load(spread), 0)", "gl.max(shared.load(spread), 0)", None),
    "shared memory is not written": ("    shared.store(parts)\n", "", None),
    "the state is rounded at each step": ("h = 0.25 * (h +", "h = 0.25 * (h.to(dtype).to(gl.float32) +", None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_recurrence_are_found(name: str, tmp_path: Path) -> None:
    old, new, error = MUTANTS[name]
    mutant = broken(tmp_path, old, new)
    if error is not None:
        with pytest.raises(error):
            exchanged(kernels=mutant)
        return
    right = exchanged()[:2]
    wrong = 0
    for seed in (None, *range(6)):
        found = exchanged(seed, kernels=mutant)[:2]
        wrong += not all(map(torch.equal, found, right))
    assert wrong


def test_a_nan_with_the_sentinels_bits_is_published_as_a_quiet_one(tmp_path: Path) -> None:
    """Else who waits for it waits for ever."""
    w, dy = torch.zeros(3, 64, 64, dtype=torch.bfloat16), torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    h_0 = torch.zeros(4, 64, dtype=torch.bfloat16)
    h_0.view(torch.int16)[1, 5] = SENTINEL
    y, _ = exchanging.run(w, h_0, dy)
    assert y[:, 1].isnan().all() and not y[:, 0].isnan().any()
    mutant = broken(tmp_path, "gl.where(bits == -1, 0x7FC0, bits)", "bits")
    with pytest.raises(Deadlock, match=r"all bits set in 1 of 1024 elements, the first e_ptr\[69\]"):
        exchanging.run(w, h_0, dy, kernels=mutant)


@pytest.mark.compiled
def test_the_recurrence_is_gluon() -> None:
    """What runs here compiles: for Hopper, ahead of time, with the products on the tensor core."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    H, split = 64, 2
    pointers = {name: "*bf16" for name in ("h_0_ptr", "w_ptr", "y_ptr", "dy_ptr")}
    pointers |= {"e_ptr": "*i16", "s_ptr": "*fp32", "dh_0_ptr": "*fp32", "T": "i32", "B": "i32"}
    for kernel, text in (
        (exchanging.forward, exchanging.wait_text(1)),
        (exchanging.backward, exchanging.wait_text(1, 3, 2 * exchanging.ROWS.value * H)),
    ):
        constants = {"H": H, "UNITS": 16, "SPLIT": split, "TEXT": text[0], "CONSTRAINTS": text[1], "PACK": 8}
        signature = {name: "constexpr" if name in constants else pointers[name] for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = GluonASTSource(kernel, signature, places, {})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": split})
        assert compiled.asm["ptx"].count("mma.sync") == 3 * (H // split // 16) * 2
        assert "ld.relaxed.gpu.global.v4.b32" in compiled.asm["ptx"]
