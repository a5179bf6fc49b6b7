"""What the committed rows say, per device: losses first, then the workloads, then medians.

Compared are tritongru as it comes, or where that was not timed (the grid) the fastest of its kernels, of those that are
not slower in a graph if there is one; and nn.GRU. Both ways: as they are called, in the same rounds, and replayed from
CUDA graphs. Neither ratio is given without the other: a "-" says that there was no graph. A loss is slower as it is
called by more than the calls themselves vary (its p20 over nn.GRU's p80 is above 1), or slower in a graph.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .cases import BASELINE
from .generated import table
from .results import ROOT, folder_of, read_rows
from .workloads import BY_CASE

OURS, KERNELS = "default", ("sequence", "step")
HEADER = ("case", "pass", "ours", "us", BASELINE, "ratio", "us in a graph", BASELINE, "ratio", "MiB", BASELINE)
Rows = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Compared:
    """A row of tritongru's beside nn.GRU's."""

    ours: dict[str, str]
    theirs: dict[str, str]

    @property
    def ratio(self) -> float:
        """As they are called."""
        return float(self.ours["p50_us"]) / float(self.theirs["p50_us"])

    @property
    def in_a_graph(self) -> float | None:
        ours, theirs = self.ours["device_us"], self.theirs["device_us"]
        return float(ours) / float(theirs) if ours and theirs else None

    @property
    def lost(self) -> bool:
        slower = float(self.ours["p20_us"]) > float(self.theirs["p80_us"])
        return slower or (self.in_a_graph or 0.0) > 1

    @property
    def cells(self) -> list[str]:
        """As HEADER has them."""
        known = BY_CASE.get(self.ours["case"])
        name = f"{known.name} ({self.ours['case']})" if known else self.ours["case"]
        us, graph, peak = (
            [f"{float(row[column]):.0f}" if row[column] else "-" for row in (self.ours, self.theirs)]
            for column in ("p50_us", "device_us", "peak_mib")
        )
        in_a_graph = "-" if self.in_a_graph is None else f"{self.in_a_graph:.3f}"
        ours = (self.ours["pass"], self.ours["provider"])
        return [name, *ours, *us, f"{self.ratio:.3f}", *graph, in_a_graph, *peak]


def main(folder: Path) -> int:
    """Print the summary of every device under `folder`; 1 where there are no rows."""
    rows = read_rows(folder)
    if not rows:
        print(f"no rows under {folder}: `python -m benchmarks day` on a CUDA machine makes them", file=sys.stderr)
        return 1
    for device in dict.fromkeys(row["device"] for row in rows):
        print("\n".join(lines(device, [row for row in rows if row["device"] == device])))
    return 0


def compared(rows: Rows) -> list[Compared]:
    """Of rows of one device, the slowest first."""
    timed: dict[tuple[str, str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok" and row["p50_us"]:
            timed[row["case"], row["pass"], row["l2"]][row["provider"]] = row
    found = []
    for by_provider in timed.values():
        if BASELINE not in by_provider or any(":" in name for name in by_provider):  # those are candidates' tiles
            continue
        names = [OURS] if OURS in by_provider else [name for name in KERNELS if name in by_provider]
        pairs = [Compared(by_provider[name], by_provider[BASELINE]) for name in names]
        found += sorted(pairs, key=lambda pair: ((pair.in_a_graph or 0.0) > 1, pair.ratio))[:1]
    return sorted(found, key=lambda pair: -pair.ratio)


def lines(device: str, rows: Rows) -> Iterator[str]:
    """The summary of a device's rows."""
    yield f"{device}: {len(rows)} rows"
    for what in ("driver", "torch", "triton", "cudnn", "tritongru", "commit"):
        yield f"  {what:<9} {', '.join(dict.fromkeys(row[what] for row in rows)) or '-'}"
    hosts = dict.fromkeys(row["note"].split(";")[0] for row in rows if row["note"].startswith("host "))
    yield f"  host      {', '.join(host.removeprefix('host ') for host in hosts) or '-'}"
    dates = sorted({row["date"] for row in rows})
    yield f"  measured  {' to '.join(dates[:: max(1, len(dates) - 1)])}"
    if (about := folder_of(device) / "README.md").exists():
        yield f"  about it  {about.relative_to(ROOT)}"
    for row in rows:
        if row["status"] not in ("ok", "unserved"):
            yield f"  {row['status']}: {row['provider']} {row['case']} {row['pass']}: {row['note']}"
    pairs = compared(rows)
    losses = [pair for pair in pairs if pair.lost]
    yield f"losses: slower than {BASELINE} as it is called, or in a CUDA graph, in {len(losses)} of {len(pairs)}"
    if losses:
        yield table(HEADER, [pair.cells for pair in losses])
    if workloads := [pair for pair in pairs if pair.ours["case"] in BY_CASE and pair.ours["provider"] == OURS]:
        yield "workloads, the slowest first"
        yield table(HEADER, [pair.cells for pair in workloads])
        for pair in workloads:
            known, both = BY_CASE[pair.ours["case"]], (pair.ours, pair.theirs)
            ours, theirs = (known.rate(float(row["p50_us"])) for row in both)
            yield f"  {known.name}: {ours}, {BASELINE} {theirs}"
    by_kind: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for pair in pairs:
        by_kind[pair.ours["pass"], pair.ours["dtype"]].append(pair)
    for (pass_, dtype), some in sorted(by_kind.items()):
        graphs = [pair.in_a_graph for pair in some if pair.in_a_graph]
        told = f"{median(graphs):.3f} in {len(graphs)}" if graphs else "-"
        yield f"median ratio, {pass_} in {dtype}: {median(p.ratio for p in some):.3f} in {len(some)}; in a graph {told}"
