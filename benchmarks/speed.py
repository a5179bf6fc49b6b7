"""Command `speed`: what results/nvidia-h200 says of speed, for README.md, kernels/README.md and the folder's own.

Times are of suite `grid`, memory of suite `long`, tiles of suite `tune`. A speed is never given of calls alone:
launched one by one, nn.GRU waits for its host, in a CUDA graph it does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .cases import BASELINE
from .generated import generate, table
from .results import RESULTS, ROOT, read_rows
from .suites import GRID_T, LONG_T, SHORT_T, TUNE_T
from .tune import Times, by_class, passes_of, winners
from .workloads import BY_CASE

FOLDER = RESULTS / "nvidia-h200"
README, KERNELS, ALL = ROOT / "README.md", ROOT / "kernels" / "README.md", FOLDER / "README.md"
BACKENDS = ("sequence", "step")
WAYS = {
    "forward": "forward",
    "forward_graph": "forward in a CUDA graph",
    "training": "training",
    "training_graph": "training in a CUDA graph",
}
PASSES = {"inference": "forward", "forward+backward": "training"}

Row = dict[str, str]
Key = tuple[str, int, int]  # dtype, H, B


@dataclass(frozen=True)
class Shape:
    """One dtype, H and B: us per timestep by way and implementation (nn.GRU, sequence, step), where measured."""

    key: Key
    us: dict[tuple[str, str], float]

    @property
    def name(self) -> str:
        return "{}, H {}, B {}".format(*self.key)

    def ratio(self, way: str, backend: str) -> float | None:
        """To nn.GRU; below 1 is faster."""
        ours, theirs = self.us.get((way, backend)), self.us.get((way, BASELINE))
        return None if ours is None or theirs is None else ours / theirs


def _key(row: Row) -> Key:
    return row["dtype"], int(row["H"]), int(row["B"])


def _plain(folder: Path, T: int, cell: bool = False) -> Iterator[Row]:
    """Rows of one layer, one direction, dense, I = H."""
    usual = {
        "T": str(T),
        "packed": "no",
        "cell": "yes" if cell else "no",
        "directions": "1",
        "layers": "1",
        "status": "ok",
        "l2": "warm",
    }
    return (row for row in read_rows(folder) if usual.items() <= row.items() and row["case"] not in BY_CASE)


def shapes(folder: Path = FOLDER, T: int = GRID_T, cell: bool = False) -> list[Shape]:
    """Those of suite `grid`, in the order of dtype, H and B."""
    found: dict[Key, Shape] = {}
    for row in _plain(folder, T, cell):
        if row["p50_us"] and (way := PASSES.get(row["pass"])):
            us = found.setdefault(_key(row), Shape(_key(row), {})).us
            us[way, row["provider"]] = float(row["p50_us"]) / T
            if row["device_us"]:
                us[f"{way}_graph", row["provider"]] = float(row["device_us"]) / T
    return sorted(found.values(), key=lambda shape: (shape.key[0] != "bf16", *shape.key))


# The lines of the README's table: the sizes most used, and of the largest losses two. All shapes are in the figure, and
# every loss in the folder's README.
SHOWN: tuple[tuple[Key, str], ...] = (
    *((("bf16", H, B), "sequence") for H, B in ((64, 32), (256, 64), (512, 1), (512, 32), (512, 128), (1024, 64))),
    *((("fp32", H, B), "sequence") for H, B in ((128, 32), (512, 32))),
    (("bf16", 2048, 64), "sequence"),
    (("bf16", 2048, 64), "step"),
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


def text(folder: Path = FOLDER) -> str:
    """The generated part of README.md."""
    by_key = {shape.key: shape for shape in shapes(folder)}
    memory = {(_key(row), row["provider"]): row for row in _plain(folder, LONG_T) if row["saved_mib"]}
    rows = []
    for key, backend in [(key, backend) for key, backend in SHOWN if key in by_key]:
        cells = [cell(by_key[key], way, backend) for way in WAYS]
        for name in ("saved_mib", "peak_mib"):
            ours, theirs = (memory.get((key, who), {}).get(name) for who in (backend, BASELINE))
            both = f"{float(ours):.0f} / {float(theirs):.0f}" if ours and theirs else ""
            cells.append(_bold(both, bool(ours and theirs and float(ours) > float(theirs))))
        rows.append([by_key[key].name, f"`{backend}`", *cells])
    return table(("", "backend", *WAYS.values(), "MiB kept for backward", "MiB at the peak"), rows)


def losses(found: Sequence[Shape]) -> list[str]:
    """Of every way and backend, how many shapes there are and which are slower than nn.GRU."""
    lines = []
    for backend in BACKENDS:
        for way, words in WAYS.items():
            ratios = {shape.name: ratio for shape in found if (ratio := shape.ratio(way, backend)) is not None}
            slower = sorted((name for name, ratio in ratios.items() if ratio > 1), key=lambda name: -ratios[name])
            if ratios:
                which = "; ".join(f"{name}: {ratios[name]:.2f}" for name in slower)
                told = f"slower in {len(slower)} of {len(ratios)} shapes" + (f" ({which})" if which else "")
                lines.append(f"- `{backend}`, {words}: median ratio {median(ratios.values()):.2f}; {told}")
    return lines


def short_calls(folder: Path = FOLDER) -> str:
    """Of a GRUCell and of T 1 and 2 the median ratios, by dtype."""
    rows = []
    for name, T in (("GRUCell", 1), ("T 1", 1), (f"T {SHORT_T}", SHORT_T)):
        found = shapes(folder, T, name == "GRUCell")
        for dtype in dict.fromkeys(shape.key[0] for shape in found):
            of_dtype = [shape for shape in found if shape.key[0] == dtype]
            for backend in BACKENDS:
                ratios = [[r for shape in of_dtype if (r := shape.ratio(way, backend))] for way in WAYS]
                if any(ratios):
                    cells = [_bold(f"{median(some):.2f}", median(some) > 1) if some else "" for some in ratios]
                    rows.append([f"{name}, {dtype}", f"`{backend}`", *cells])
    return table(("median ratio", "backend", *WAYS.values()), rows)


def losses_text(folder: Path = FOLDER) -> str:
    """The generated part of the folder's README.md: where it is slower, of all shapes and of few timesteps."""
    return "\n".join([*losses(shapes(folder)), "", short_calls(folder)])


def kernel_text(folder: Path = FOLDER) -> str:
    """The generated part of kernels/README.md: calls of `sequence` in a CUDA graph, as planned and with the tiles that
    won, beside nn.GRU's."""
    rows = [row for row in read_rows(folder) if row["T"] == str(TUNE_T)]
    won = {(r["backend"], r["pass"], r["dtype"], r["H"], r["B"]): r for r in winners(rows)}
    lines = []
    for (dtype, H, B), by_provider in sorted(by_class(rows).items()):
        if "sequence" in by_provider:
            cells = []
            for pass_ in ("forward", "backward"):
                best = won["sequence", pass_, dtype, H, B]
                us = [_us(by_provider, BASELINE, pass_), best["planned_us"]]
                us += [f"{best['us_per_step']} ({best['fields']})" if best["fields"] else ""]
                cells += us
            lines.append([f"{dtype}, H {H}, B {B}", *map(str, cells)])
    header = [f"{pass_}, {of}" for pass_ in ("forward", "backward") for of in (BASELINE, "planned tiles", "others won")]
    return table(("", *header), lines)


def _us(by_provider: Mapping[str, dict[str, Times]], provider: str, pass_: str) -> str:
    times = passes_of(by_provider.get(provider, {})).get(pass_)
    return f"{times[1] / TUNE_T:.4g}" if times else ""


# Where each text stands.
GENERATED = ((README, text), (KERNELS, kernel_text), (ALL, losses_text))


def main() -> int:
    """Write all three."""
    for document, make in GENERATED:
        generate(document, "speed", make())
    print(f"what {FOLDER.relative_to(ROOT)} says is in README.md, kernels/README.md and the folder's own")
    return 0
