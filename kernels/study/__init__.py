"""The forms that `step` and `sequence` are compared with: device code alone, forward alone, not installed.

kernels/README.md tells them one after the other; benchmarks/forms.py launches them.
"""
