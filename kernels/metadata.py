"""What a launch tells a profiler: its name with its sizes, and the least that it computes and moves.

Triton hands these to its launch hooks (`launch_metadata`), where Proton reads them; `python -m tritongru profile` shows
them too. They are counted on the host, from the arguments of the launch:

    flops   of the matrix products of the rows that run, two for a multiply and an add; padding and the arithmetic of
            the gates are left out. Again under the width of the factors: flops16, flops32
    bytes   compulsory traffic: each element that the launch reads once, and each that it writes once, however many
            programs or timesteps share it; one that it reads and overwrites counts as both. The status words, which
            waiting programs look at, are left out

tests/test_profile.py holds the bytes against the addresses that the kernels touch in the interpreter. They differ where
the host does not know the lengths: in `sequence_backward` of a packed batch without dh_0, whose rows all count as if
they ran at the first and the second visit of a direction.
"""


def _told(kernel, sizes, args, flops, moved):
    named = ", ".join(f"{size}={args[size]}" for size in sizes)
    width = 8 * args["rzn_ptr"].element_size()
    return {"name": f"{kernel} [{named}]", "flops": flops, f"flops{width}": flops, "bytes": moved}


def step_forward(grid, metadata, args):
    """Of kernels/step.py's step_forward."""
    H, I, D, fused = args["H"], args["I"], args["D"], args["FUSE_INPUT"]
    size = args["y_ptr"].element_size()
    flops = 0
    moved = args["rows"] * I * size  # x, which both directions read; I is 0 unless the kernel takes it
    for way in ("", "_reverse")[:D]:
        rows = args[f"rows{way}"]
        read = 3 * H * (H + I) + 3 * H * args["HAS_BIAS"] * (1 + fused) + rows * H + rows * 3 * H * (not fused)
        written = 2 * rows * H + rows * 4 * H * args["SAVE_GATES"]  # y, and h as what comes next or as h_n
        moved += (read + written) * size
        if args["KEEP_STATE"]:
            moved += (min(rows, args[f"rows_before{way}"]) + rows) * H * args["state_ptr"].element_size()
        flops += 2 * rows * 3 * H * (H + I)
    return _told("step_forward", "BHD", args, flops, moved)


def step_backward(grid, metadata, args):
    """Of kernels/step.py's step_backward."""
    H, D, first = args["H"], args["D"], args["FIRST"]
    size, dy = args["y_ptr"].element_size(), args["dy_ptr"]
    flops, moved = 0, dy.element_size() * (not args["stride_dy_h"])  # the gradient of a sum is one element, expanded
    for way in ("", "_reverse")[:D]:
        src, dst = args[f"rows_src{way}"], args[f"rows_dst{way}"]
        begin, end = max(dst - src, 0), max(src - dst, 0)  # rows that begin their way back at dst, that end it at src
        made = [src, dst] if first else [dst]  # rows of each visit whose gate gradients are made
        read = 3 * H * H + sum(made) * (4 + 1) * H + src * (3 + 1) * H * (not first)  # W_hh; gates, h_prev; of src
        moved += (read + sum(made) * 4 * H) * size
        moved += (src * (not first) + dst) * H * args["dh_ptr"].element_size()
        moved += (src * first + begin) * H * args["dh_n_ptr"].element_size() + end * H * args["dh_0_ptr"].element_size()
        if args["stride_dy_h"]:
            moved += sum(rows if args["stride_dy_b"] else min(rows, 1) for rows in made) * H * dy.element_size()
        flops += 2 * src * 3 * H * H
    return _told("step_backward", "BHD", args, flops, moved)


def sequence_forward(grid, metadata, args):
    """Of kernels/sequence.py's sequence_forward."""
    T, B, H, D, exchange = args["T"], args["B"], args["H"], args["D"], args["EXCHANGE"]
    P, size, N = args["vectors"] * 8, args["y_ptr"].element_size(), args["y_ptr"].numel() // (D * H)
    read = N * 3 * H + args["w_ptr"].numel() + 3 * H * args["has_bias"] + B * (P if exchange else H)
    written = N * 4 * H * args["save_gates"] + B * H
    if exchange:  # h of the rows that carry theirs is received; every row publishes
        read += (N - B) * P
        written += N * P + N * H * args["own_exchange"]
    else:
        written += N * H
    moved = (read + written) * size + 2 * B * H * args["state_ptr"].element_size() * exchange
    directions = grid[2]
    return _told(
        "sequence_forward", "TBHD", args, directions * 2 * N * 3 * H * H, directions * moved + 8 * T * args["packed"]
    )


def sequence_backward(grid, metadata, args):
    """Of kernels/sequence.py's sequence_backward."""
    T, B, H, D, exchange, want = (args[name] for name in ("T", "B", "H", "D", "EXCHANGE", "want_dh_0"))
    P, size, N, dy = args["vectors"] * 8, args["y_ptr"].element_size(), args["size_rows"], args["dy_ptr"]
    handed_on = N if want else N - B  # rows whose dh goes to the visit before
    read = args["w_ptr"].numel() + N * (4 + 1) * H + handed_on * 3 * P * exchange
    moved = (read + N * 4 * P) * size
    moved += B * H * args["dh_n_ptr"].element_size() + B * H * args["dh_0_ptr"].element_size() * want
    moved += B * H * args["state_ptr"].element_size() * (1 + bool(handed_on)) * exchange
    directions = grid[2]
    of_dy = dy.element_size()
    for n, stride in zip(dy.shape, dy.stride(), strict=True):  # expanded, it has fewer elements than places
        of_dy *= n if stride else 1
    if args["stride_dy_h"]:
        of_dy = of_dy * directions // D
    moved = directions * moved + of_dy + 8 * T * args["packed"]
    return _told("sequence_backward", "TBHD", args, directions * 2 * handed_on * 3 * H * H, moved)
