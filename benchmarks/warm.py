"""`python -m benchmarks.warm`: every kernel form that the suites use, compiled side by side into one Triton cache.

Each form is compiled as a call compiles it: by a call of two timesteps on the GPU, in as many processes as there are
cores less two. Of calls that would compile the same kernels one is made. TRITON_CACHE_DIR says where they are kept.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch

from tritongru.planning import Device, choose, describe
from tritongru.planning.devices import of_cuda

from .cases import Case
from .compiled import no_compiler
from .providers import PROVIDERS, find
from .suites import SUITES

WARMED = ("tune", "grid", "right", "workloads", "long")
Call = tuple[Case, str, bool]  # case, backend, whether it trains


def calls(suites: Iterable[str], device: Device) -> Iterator[Call]:
    """One call for each kernel, or few."""
    seen: set[object] = set()
    for suite in suites:
        for entry in SUITES[suite](device):
            training = any("backward" in name for name in entry.passes)
            for name in entry.providers:
                if name in PROVIDERS and not find(name).ours:
                    continue
                try:
                    plan = choose(entry.case.problem(training), device, None if name == "default" else name)
                except ValueError:
                    continue  # it is not served, which the suite's row will say
                forms = {_form(entry.case, kind, tiles) for kind, tiles in plan.tiles}
                if not forms <= seen:
                    seen |= forms
                    yield replace(entry.case, T=min(entry.case.T, 2), layers=1, blocks=1), name, training


def _form(case: Case, kind: str, tiles: object) -> object:
    """What tells a compiled kernel from others: of `sequence` H is not among it, nor whether gates are saved."""
    form = getattr(tiles, "form", None)
    return (kind, case.dtype, form) if form else (kind, case.dtype, case.H, case.I, case.bidirectional, tiles)


def compile_call(call: Call) -> float:
    """Seconds that a call took."""
    from . import work

    case, name, training = call
    start = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    module = find(name).make(case, device=device, dtype=work.TORCH_DTYPES[case.dtype])
    inputs = work.Inputs.draw(case, device)
    (work.forward_backward if training else work.inference)(module, inputs)()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main(dry: bool = False) -> int:
    """Compile; 0 if nothing failed. dry: only the number is said."""
    if why_not := None if dry else no_compiler():
        print(f"python -m benchmarks.warm: {why_not}", file=sys.stderr)
        return 1
    device = describe("h200") if dry else of_cuda(torch.cuda.current_device())
    wanted = list(calls(WARMED, device))
    workers = max(1, (os.cpu_count() or 1) - 2)
    print(f"{len(wanted)} calls compile the forms of {', '.join(WARMED)}, in {workers} processes", flush=True)
    if dry:
        return 0
    failed, start = 0, time.perf_counter()
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = {pool.submit(compile_call, call): call for call in wanted}
        for done, future in enumerate(as_completed(pending), 1):
            case, name, _ = pending[future]
            try:
                said = f"{future.result():.1f} s"
            except Exception as error:  # the suite's row will say so too; others are still to be compiled
                failed += 1
                said = f"FAILED: {type(error).__name__}: {str(error)[:150]}"
            at = time.perf_counter() - start
            print(f"{at:6.1f} s  {done} of {len(wanted)}  {name} {case.name}: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main("--dry-run" in sys.argv))
