"""Measurements, run from a clone as `python -m benchmarks [COMMAND]`.

    run       (default) a suite: every provider right first, then timed beside nn.GRU; a CSV row for each
                  --suite quick   a cross-section, for some minutes on a data-centre GPU
                  --suite full    DeepBench's GRUs; H x B x dtype; layers; packed; T; streaming; LSTM and RNN: hours
                  --suite cpu     what can be timed without a GPU: the layer's own cost, and PyTorch's paths
    summary   what the rows say: losses first, then wins, then means over whole suites
    compiled  what the compiler makes of the kernels, for GPUs that need not be present
    study     the forms of kernels/README.md, compiled: its table
    speed     what an H200's rows say of the layer's speed, into README.md and kernels/README.md
    table     an H200's rows, made into the times by which the layer chooses (tritongru/planning/tables)
    story     `python -m tritongru demo --story` over five seeds, on the CPU
    day       all that a GPU is wanted for, into one folder: tests, memcheck, check, quick, full

Rows are appended to OUT/gru.csv as they come (default benchmarks/results/<gpu>; without a GPU ./out), each with device,
driver, versions and commit; columns: results.py. What is still open, and the command for it: QUESTIONS.md.

A shape is a line in cases.py, a provider a line in providers.py. How time is taken: run.py, timing.py, hostcost.py.
"""
