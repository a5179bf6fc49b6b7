"""`python -m benchmarks.memcheck`: small, odd calls of `step` and `sequence`, each way, for compute-sanitizer to watch.

Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1: a tensor is then an allocation of its own, and a step beyond it is seen.
"""

from __future__ import annotations

import os
import sys

import torch

import tritongru

from . import work
from .cases import MEMCHECK_CASES
from .providers import PROVIDERS
from .run import no_gpu


def main() -> int:
    why_not = no_gpu()
    if why_not:
        print(f"python -m benchmarks.memcheck: {why_not}", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    os.environ.setdefault("TRITONGRU_WAIT_SECONDS", "600")  # a checker slows the programs that others wait for
    for case in MEMCHECK_CASES:
        for backend in ("step", "sequence"):
            module = PROVIDERS[backend].make(case, device=device, dtype=work.TORCH_DTYPES[case.dtype])
            module.load_state_dict(work.weights(case, device))
            inputs = work.Inputs.draw(case, device)
            work.inference(module, inputs)()
            work.outcome(module, inputs)
            tritongru.synchronize()
            print(f"ran {backend} {case.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
