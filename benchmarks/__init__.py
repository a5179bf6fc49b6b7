"""Measurements, run from a clone as `python -m benchmarks [COMMAND]`; `COMMAND --help` has its options.

    run       (default on a GPU) a suite: every provider beside nn.GRU; a CSV row for each
                  --suite workloads  the GRUs that people train, each held against float64 before it is timed
                  --suite grid       T 128 over H, B and dtype: what the layer chooses by
                  --suite tune       candidates of tiles
                  --suite right      every backend held against float64; memcheck: small calls, for compute-sanitizer
                  --suite first      first calls, with their compilation; study: the forms of kernels/README.md
    cpu       (default elsewhere) what can be timed without a GPU: the layer's own cost, and that of a GPU's host
    day       all that a GPU is wanted for, into one folder, in nine minutes; --dry-run goes through it without one
    summary   what the rows say: losses first, then workloads, then medians
    table     the rows made into what the layer chooses by (tritongru/planning/tables and tiles)
    speed     what an H200's rows say of the layer's speed, into README.md and kernels/README.md
    compiled  what the compiler makes of the kernels, for GPUs that need not be present
    study     the forms of kernels/README.md, compiled: its table
    story     `python -m tritongru demo --story` over five seeds, on the CPU

Rows are appended to OUT/gru.csv as they come (default benchmarks/results/<gpu>; without a GPU ./out), each with device,
driver, versions and commit; columns: results.py. What is still open, and the command for it: QUESTIONS.md.

A shape is a line in suites.py or workloads.py, a provider a line in providers.py. How time is taken: run.py, timing.py,
hostcost.py.
"""

import time

START = time.monotonic()  # what a budget counts from: importing PyTorch and Triton takes seconds
