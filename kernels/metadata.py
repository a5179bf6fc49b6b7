"""What a launch tells a profiler: its name with its sizes, and the least that it computes and moves.

Triton hands these to its launch hooks (`launch_metadata`), where Proton reads them; `python -m tritongru profile` shows
them too. They are counted on the host, from the arguments of the launch:

    flops   of the matrix products of the rows that run, two for a multiply and an add; padding and the arithmetic of
            the gates are left out. Again under the width of the factors: flops16, flops32
    bytes   compulsory traffic: each element that the launch reads once, and each that it writes once, however many
            programs or timesteps share it; one that it reads and overwrites counts as both. The status words, which
            waiting programs look at, are left out

tests/test_profile.py holds the bytes against the addresses that the kernels touch in the emulator. They are
approximate where the host does not know the lengths: of a packed batch in `sequence` (each function says how), and of a
padded one, whose rows count as if they ran all steps.
"""


def _told(kernel, sizes, args, flops, moved):
    named = ", ".join(f"{size}={args[size]}" for size in sizes)
    width = 8 * args["rzn_ptr"].element_size()
    return {"name": f"{kernel} [{named}]", "flops": flops, f"flops{width}": flops, "bytes": moved}


def _of_step(args):
    """Bytes of `lengths` and `resets`, for each direction."""
    return args["D"] * args["B"] * (4 * args["PADDED"] + args["RESETS"])


def step_forward(grid, metadata, args):
    H, I, D, fused = args["H"], args["I"], args["D"], args["FUSE_INPUT"]
    size = args["y_ptr"].element_size()
    flops = 0
    moved = args["rows"] * I * size + _of_step(args)  # x, which both directions read; I is 0 unless the kernel takes it
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
    H, D, first = args["H"], args["D"], args["FIRST"]
    size, dy = args["y_ptr"].element_size(), args["dy_ptr"]
    flops, moved = (
        0,
        dy.element_size() * (not args["stride_dy_h"]) + _of_step(args),
    )  # the gradient of a sum is one element, expanded
    for way in ("", "_reverse")[:D]:
        src, dst = args[f"rows_src{way}"], args[f"rows_dst{way}"]
        begin, end = max(dst - src, 0), max(src - dst, 0)  # rows that begin their way back at dst, that end it at src
        # W_hh; r, z, n, q and h_prev of dst; dr, dz, dq and z of src
        read = 3 * H * H * (not first) + dst * (4 + 1) * H + src * (3 + 1) * H
        moved += (read + dst * 4 * H) * size + (src + dst) * H * args["dh_ptr"].element_size()
        moved += begin * H * args["dh_n_ptr"].element_size() + end * H * args["dh_0_ptr"].element_size()
        if args["stride_dy_h"]:
            moved += (dst if args["stride_dy_b"] else min(dst, 1)) * H * dy.element_size()
        flops += 2 * src * 3 * H * H
    return _told("step_backward", "BHD", args, flops, moved)


def small_forward(grid, metadata, args):
    B, H, D, size = args["B"], args["H"], args["D"], args["y_ptr"].element_size()
    N = args["y_ptr"].numel() // (D * H)
    read = N * 3 * H + args["w_ptr"].numel() + 3 * H * args["has_bias"] + B * H
    written = N * H + N * 4 * H * args["save_gates"] + B * H
    moved = D * (read + written) * size + _of_rows(args)
    return _told("small_forward", "TBHD", args, D * 2 * N * 3 * H * H, moved)


def small_backward(grid, metadata, args):
    B, H, D, size, N = args["B"], args["H"], args["D"], args["y_ptr"].element_size(), args["size_rows"]
    handed_on = N if args["want_dh"] else N - B  # rows whose dh goes to the visit before
    moved = (args["w_ptr"].numel() + N * (4 + 1 + 4) * H) * size + B * H * 4 * (1 + args["want_dh"])
    moved = D * moved + _expanded(args["dy_ptr"]) + _of_rows(args)
    return _told("small_backward", "TBHD", args, D * 2 * handed_on * 3 * H * H, moved)


def _expanded(tensor):
    """Bytes of a tensor's elements: expanded, it has fewer than places."""
    found = tensor.element_size()
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found *= n if stride else 1
    return found


def _of_rows(args):
    """Bytes of `lengths`, `resets` and the table of a packed batch, of a launch of kernels/sequence.py or small.py."""
    T, B = args["T"], args["B"]
    return 4 * T * args["packed"] + 4 * B * args["has_lengths"] + T * B * args["RESETS"]


def _of_launch(grid, args):
    """What a launch of kernels/sequence.py serves: visits; rows of its tiles; those of them that are in the batch; and
    how many rows all visits have together, in a packed batch the launch's share of them on average."""
    visits, rows = args["stop_visit"] - args["first_visit"], grid[1] * args["TILES"] * args["ROWS"]
    inside = min(rows, args["B"] - args["first_row"])
    N = args["y_ptr"].numel() // (args["D"] * args["H"])
    n = round(N * inside / args["B"] * visits / args["T"]) if args["packed"] else visits * inside
    return visits, rows, inside, n


def sequence_forward(grid, metadata, args):
    """Of kernels/sequence.py's sequence_forward; of a packed batch as if every group had the visits of the first."""
    T, H, directions, size = args["T"], args["H"], grid[2], args["y_ptr"].element_size()
    visits, rows, inside, n = _of_launch(grid, args)
    exchanged = rows * (visits * args["PARTS"] * args["PART"] + (visits + 1) * grid[0] * args["UNITS"])
    moved = n * (3 + 1 + 4 * args["save_gates"]) * H + args["w_ptr"].numel() + 3 * H * args["has_bias"] + exchanged
    moved = moved * size + inside * H * (4 if args["first_visit"] else size)
    moved += inside * H * (4 if args["stop_visit"] < T else size)
    moved = directions * moved + _of_rows(args)
    return _told("sequence_forward", "TBHD", args, directions * 2 * n * 3 * H * H, moved)


def sequence_backward(grid, metadata, args):
    """Of kernels/sequence.py's sequence_backward, as of sequence_forward."""
    T, B, H, D, want = args["T"], args["B"], args["H"], args["D"], args["want_dh"]
    directions, size, dy = grid[2], args["y_ptr"].element_size(), args["dy_ptr"]
    visits, rows, inside, n = _of_launch(grid, args)
    exchanged = rows * 3 * ((visits + want) * args["PARTS"] * args["PART"] + (visits + 1) * grid[0] * args["UNITS"])
    moved = (args["w_ptr"].numel() + n * (4 + 1 + 4) * H + exchanged) * size + inside * H * 4 * (1 + want)
    of_dy = _expanded(dy) * (directions / D if args["stride_dy_h"] else 1)
    for served, of_all, stride in ((visits, T, args["stride_dy_t"]), (inside, B, args["stride_dy_b"])):
        of_dy = of_dy * served / of_all if stride else of_dy
    moved = directions * moved + round(of_dy) + _of_rows(args)
    handed_on = n if want else n - inside
    return _told("sequence_backward", "TBHD", args, directions * 2 * handed_on * 3 * H * H, moved)
