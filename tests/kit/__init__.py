"""What tests share: the rule of numerics, fences around memory, mutated kernels, counted launches and bytes."""
