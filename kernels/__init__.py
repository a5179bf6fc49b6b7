"""Device code: every kernel of tritongru, installed as `tritongru.kernels` (private). Imports triton alone.

Read `gates.py` (the equations), then `step.py`. Notation: sizes T B I H D = time, batch, input, hidden, directions;
gates in PyTorch's order r z n, with q = h_{t-1} W_hn^T + b_hn, the hidden part of the candidate.
"""

# An option that every kernel is compiled with: a * b + c rounds once. Without being told, Triton 3.9 warns and 3.10 no
# longer fuses.
FUSED = {"enable_fp_fusion": True}
