"""Command `speed`: what results/nvidia-h200 says of speed, for README.md, kernels/README.md and the folder's own.

The rows are those of suite `grid`; until there are any, those that were timed beside the harness (its README.md says
how), and of gru.csv the memory. A speed is never given of calls alone: launched one by one, nn.GRU waits for its
host, in a CUDA graph it does not. Of the first rows' training no graph was timed; in its place stand the kernels of a
call, added up.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .cases import BASELINE
from .generated import generate, table
from .results import RESULTS, ROOT, ROWS, read
from .suites import GRID_T

FOLDER = RESULTS / "nvidia-h200"
README, KERNELS, ALL = ROOT / "README.md", ROOT / "kernels" / "README.md", FOLDER / "README.md"
T = 512  # of every row but those of a grid
BACKENDS = ("sequence", "step")
WAYS = {
    "forward": "forward",
    "forward_graph": "forward in a CUDA graph",
    "training": "training",
    "kernels": "training, kernels alone",
}
# A step of nn.GRU in training is two products and two kernels of gates, but where it is one kernel for all steps. Where
# the listing has fewer than three a step, it is no measure of the call.
LISTED, PERSISTENT = 3 * T, "blockPersist"

Row = dict[str, str]
Key = tuple[str, int, int]  # dtype, H, B


@dataclass(frozen=True)
class Shape:
    """One dtype, H and B: us per timestep by way and implementation (nn.GRU, sequence, step), where measured."""

    key: Key
    us: dict[tuple[str, str], float]
    source: str  # the file of its calls

    @property
    def name(self) -> str:
        return "{}, H {}, B {}".format(*self.key)

    def ratio(self, way: str, backend: str) -> float | None:
        """To nn.GRU; below 1 is faster."""
        ours, theirs = self.us.get((way, backend)), self.us.get((way, BASELINE))
        return None if ours is None or theirs is None else ours / theirs


def rows_of(name: str, folder: Path) -> Iterator[Row]:
    path = folder / name
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _key(row: Row) -> Key:
    return row["dtype"], int(row["H"]), int(row["B"])


def kernel_times(folder: Path = FOLDER) -> dict[Key, dict[str, list[Row]]]:
    """The rows of kernels.csv by shape and implementation."""
    found: dict[Key, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of("kernels.csv", folder):
        found[_key(row)][row["provider"]].append(row)
    return found


def shapes(folder: Path = FOLDER) -> list[Shape]:
    """Those of suite `grid`, where the folder has its rows; else every shape of first_look.csv, and of gru.csv what is
    not among them. In the order of dtype, H and B."""
    found = _of_rows(folder, GRID_T, {"forward": "forward_graph", "training": "kernels"})
    found = found or {**_of_rows(folder, T, {"training": "kernels"}), **_of_first_look(folder)}
    return sorted(found.values(), key=lambda shape: (shape.key[0] != "bf16", *shape.key))


def of_a_grid(found: Sequence[Shape]) -> bool:
    return all(shape.source == ROWS for shape in found)


def ways(found: Sequence[Shape]) -> dict[str, str]:
    """WAYS, as these shapes were timed."""
    return {**WAYS, "kernels": "training in a CUDA graph"} if of_a_grid(found) else WAYS


def _of_rows(folder: Path, T: int, alone: dict[str, str]) -> dict[Key, Shape]:
    """Of gru.csv. alone: which way `device_us` is of, by that of the call."""
    found: dict[Key, Shape] = {}
    for row in _plain(folder, T):
        if way := {"inference": "forward", "forward+backward": "training"}.get(row["pass"]):
            us = found.setdefault(_key(row), Shape(_key(row), {}, ROWS)).us
            us[way, row["provider"]] = float(row["us_per_step"])
            if way in alone and row["device_us"]:
                us[alone[way], row["provider"]] = float(row["device_us"]) / T
    return found


def _of_first_look(folder: Path) -> dict[Key, Shape]:
    found, names, listed = {}, {"nn": BASELINE, "sequence": "sequence", "step": "step"}, kernel_times(folder)
    for row in rows_of("first_look.csv", folder):
        us = {
            (way, name): float(row[f"{column}_{way}"])
            for way in WAYS
            for column, name in names.items()
            if row.get(f"{column}_{way}")
        }
        for name, kernels in listed[_key(row)].items():
            launches = sum(int(kernel["count"]) for kernel in kernels)
            if name != BASELINE or launches >= LISTED or any(PERSISTENT in kernel["kernel"] for kernel in kernels):
                us["kernels", name] = sum(float(kernel["total_us"]) for kernel in kernels) / T
        found[_key(row)] = Shape(_key(row), us, "first_look.csv")
    return found


# The lines of the README's table: the sizes most used, and the largest losses. All shapes are in the figure, and every
# loss in the folder's README.
SHOWN: tuple[tuple[Key, str], ...] = (
    *((("bf16", H, B), "sequence") for H, B in ((256, 64), (512, 1), (512, 32), (512, 128), (1024, 16), (1024, 64))),
    (("bf16", 2048, 64), "step"),
    (("bf16", 2048, 64), "sequence"),
    (("fp32", 512, 32), "sequence"),
    (("fp32", 128, 32), "sequence"),
)


def _figure(us: float) -> str:
    return f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def _bold(words: str, on: bool) -> str:
    return f"**{words}**" if on else words


def cell(shape: Shape, way: str, backend: str) -> str:
    """Ours, nn.GRU's and the ratio, which is bold where ours takes longer."""
    ratio = shape.ratio(way, backend)
    if ratio is None:
        return ""
    ours, theirs = (_figure(shape.us[way, name]) for name in (backend, BASELINE))
    return f"{ours} / {theirs} = {_bold(f'{ratio:.2f}', ratio > 1)}"


def _plain(folder: Path, T: int) -> list[Row]:
    """Rows of gru.csv of one layer, one direction, dense."""
    usual = {"T": str(T), "packed": "no", "directions": "1", "layers": "1", "status": "ok", "l2": "warm"}
    return [row for row in read(folder / ROWS) if usual.items() <= row.items()]


def text(folder: Path = FOLDER) -> str:
    """The generated part of README.md."""
    found = shapes(folder)
    by_key = {shape.key: shape for shape in found}
    memory = {(_key(row), row["provider"]): row for row in _plain(folder, T) if row["saved_mib"]}
    rows = []
    for key, backend in [(key, backend) for key, backend in SHOWN if key in by_key]:
        cells = [cell(by_key[key], way, backend) for way in WAYS]
        for name in ("saved_mib", "peak_mib"):
            ours, theirs = (memory.get((key, who), {}).get(name) for who in (backend, BASELINE))
            both = f"{float(ours):.0f} / {float(theirs):.0f}" if ours and theirs else ""
            cells.append(_bold(both, bool(ours and theirs and float(ours) > float(theirs))))
        rows.append([by_key[key].name, f"`{backend}`", *cells])
    return table(("", "backend", *ways(found).values(), "MiB kept for backward", "MiB at the peak"), rows)


def losses(found: Sequence[Shape]) -> list[str]:
    """Of every way and backend, how many shapes there are and which are slower than nn.GRU."""
    lines = []
    for backend in BACKENDS:
        for way, words in ways(found).items():
            ratios = {shape.name: ratio for shape in found if (ratio := shape.ratio(way, backend)) is not None}
            slower = sorted((name for name, ratio in ratios.items() if ratio > 1), key=lambda name: -ratios[name])
            if ratios:
                which = "; ".join(f"{name}: {ratios[name]:.2f}" for name in slower)
                told = f"slower in {len(slower)} of {len(ratios)} shapes" + (f" ({which})" if which else "")
                lines.append(f"- `{backend}`, {words}: median ratio {median(ratios.values()):.2f}; {told}")
    return lines


def losses_text(folder: Path = FOLDER) -> str:
    """The generated part of the folder's README.md: where it is slower, of all shapes and of few timesteps."""
    by_time: dict[str, list[Row]] = defaultdict(list)
    for row in rows_of("host.csv", folder):
        by_time[row["T"]].append(row)
    sizes = " and ".join(f"H {row['H']}, B {row['B']}" for row in next(iter(by_time.values())))
    told = []
    for time, rows in by_time.items():
        forward, training = (
            " and ".join(f"{float(row[f'ours_{way}']) / float(row[f'nn_{way}']):.2f}" for row in rows)
            for way in ("f", "fb")
        )
        told.append(f"T {time}: {forward} forward, {training} training")
    short = f"- short sequences, where the host decides ({sizes}; the layer as it came), ratios: {'; '.join(told)}"
    return "\n".join([*losses(shapes(folder)), short])


def study_times(folder: Path = FOLDER) -> dict[tuple[Key, str], float]:
    """us of a step of the Gluon prototype by shape and pass: its fastest form that computes the same, gates unsaved."""
    found: dict[tuple[Key, str], float] = {}
    for row in rows_of("prototypes.csv", folder):
        if row["kernel"] in ("forward", "backward") and row["save_gates"] != "1":
            at = _key(row), row["kernel"]
            found[at] = min(float(row["us_per_step"]), found.get(at, float("inf")))
    return found


def kernel_text(folder: Path = FOLDER) -> str:
    """The generated part of kernels/README.md: the recurrent kernels alone, and the prototype's beside them."""
    first: dict[tuple[Key, str], float] = {}
    for key, by_name in kernel_times(folder).items():
        for row in by_name["sequence"]:
            if row["kernel"].startswith("sequence_"):
                first[key, row["kernel"].removeprefix("sequence_")] = float(row["total_us"]) / T
    study = study_times(folder)
    lines = []
    for dtype, H, B in sorted({key for key, _ in study} & {key for key, _ in first}):
        ways = [((dtype, H, B), pass_) for pass_ in ("forward", "backward")]
        cells = [_figure(some[at]) if at in some else "" for at in ways for some in (first, study)]
        lines.append([f"H {H}, B {B}", *cells])
    return table(("bf16", "forward", "prototype, forward", "backward", "prototype, backward"), lines)


# Where each text stands.
GENERATED = ((README, text), (KERNELS, kernel_text), (ALL, losses_text))


def main() -> int:
    """Write all three."""
    for document, make in GENERATED:
        generate(document, "speed", make())
    print(f"what {FOLDER.relative_to(ROOT)} says is in README.md, kernels/README.md and the folder's own")
    return 0
