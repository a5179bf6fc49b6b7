"""The measured ceilings of an H200."""

from benchmarks.limit import Ceilings

TOP = Ceilings(  # those of results/nvidia-h200/ceilings.csv, in three digits
    sms=132, clock_ghz=1.98, l2_read_tb_s=11.9, l2_bytes_per_clock=92.3, l2_round_trip_ns=254, dram_tb_s=4.48,
    half_tflops=881, tf32_tflops=448, fma_tflops=50.9, mma_share=0.71, graph_us=1.13, stream_us=5.71,
    shared_bytes_per_clock=128,
)  # fmt: skip
