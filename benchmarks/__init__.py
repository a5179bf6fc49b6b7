"""Measurements, run from a clone as `python -m benchmarks [cpu | gpu | day]`.

    cpu   (default) what can be timed without a GPU: the cost of tritongru.GRU over nn.GRU on PyTorch's path, and the
          host's cost per timestep of backend `step` with the launch itself replaced by nothing
    gpu   `step` against nn.GRU on the CUDA device: right first, then timed; one CSV row per case, provider and pass
    day   all that a GPU is wanted for, into one folder: GPU tests, memcheck, `python -m tritongru check`, suite gpu

Rows are appended to OUT/cpu.csv or OUT/gpu.csv as they come (default ./out; `day`: benchmarks/results/<gpu>), each with
device, driver, versions and commit; columns: results.py. What is still open, and the command for it: QUESTIONS.md.

A case is a line in cases.py, a provider a line in providers.py. How time is taken: timing.py, gpu.py, hostcost.py.
"""
