"""Figures of the repository's own facts: counted from sizes, compiled, and measured. Nothing is timed.

    python -m plots [--results DIR] [--out DIR] [--only NAME]

draws every figure whose data is there, as PNG, and says of the others which command makes their data.
"""
