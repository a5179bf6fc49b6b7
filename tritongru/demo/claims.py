"""What the story says of these networks, held against the rows of trained ones. The rule stands before the result."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import networks as n
from .networks import GATES, GRU, GRU_SHORT, LSTM, LSTM_EQUAL, RNN, RNN_EQUAL, RNN_SHORT, SHORT, STATES, TRIGRAM
from .story import DISHES

Rows = Sequence[Mapping[str, object]]
LONGEST = n.TRAINED[-1]  # the longest gap that was trained on
RULE = """Better means: the means over the seeds differ by more than both standard deviations together and by more than
2 points in 100. A completion is right if it is in every seed."""


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    deviation: float  # 0 of one seed
    seeds: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.0f}{f' ± {100 * self.deviation:.0f}' if self.seeds > 1 else ''} %"

    def beats(self, other: "Spread", least: float = 0.02) -> bool:
        """By the rule; less than `least` nobody would care about."""
        return self.mean - other.mean > max(self.deviation + other.deviation, least)


class Claim(NamedTuple):
    """A sentence of the story, whether it held, and by which numbers."""

    text: str
    held: bool
    numbers: str


def spread(values: Iterable[float]) -> Spread:
    found = list(values)
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def shares(rows: Rows, model: str, measure: str, at: int) -> dict[str, float]:
    """Share of right answers by seed, at a gap, a number of switches or a sentence. Raises: ValueError without rows."""
    asked = [row for row in rows if (row["model"], row["measure"], str(row["at"])) == (model, measure, str(at))]
    if not asked:
        raise ValueError(f"no rows of {model!r} for {measure} {at}")
    return {str(row["seed"]): int(str(row["right"])) / int(str(row["asked"])) for row in asked}


def accuracy(rows: Rows, model: str, measure: str, at: int) -> Spread:
    """Those shares over the seeds."""
    return spread(shares(rows, model, measure, at).values())


def gaps_of(rows: Rows, measure: str = "gap") -> list[int]:
    """The gaps (or numbers of switches) that were asked for."""
    return sorted({int(str(row["at"])) for row in rows if row["measure"] == measure})


def size_of(rows: Rows, model: str) -> dict[str, int]:
    """Input, hidden size and parameters of a model."""
    row = next(row for row in rows if row["model"] == model)
    return {name: int(str(row[name])) for name in ("input", "hidden", "parameters")}


def judge(rows: Rows) -> list[Claim]:
    """Every claim of the story, in its order."""
    gaps, most = gaps_of(rows), max(gaps_of(rows, "switches"))
    within = max(gap for gap in gaps if gap <= LONGEST)
    beyond = [gap for gap in gaps if gap > LONGEST]

    def at(network: n.Network | str, place: int = within, measure: str = "gap") -> Spread:
        return accuracy(rows, network if isinstance(network, str) else network.name, measure, place)

    def switched(network: n.Network | str, number: int = most) -> Spread:
        return at(network, number, "switches")

    def told(sentence: int) -> tuple[bool, str]:
        found = at(GRU, sentence, "story")
        return found.mean == 1, f"right in {round(found.mean * found.seeds)} of {found.seeds} seeds"

    learned = max(gap for gap in gaps if gap <= SHORT[-1])
    reach = [gap for gap in gaps if learned <= gap <= within]
    rnn, gru = (", ".join(str(at(network, gap)) for gap in reach) for network in (RNN_SHORT, GRU_SHORT))
    better = (at(GRU).beats(at(RNN)), at(GRU).beats(at(RNN_EQUAL)), at(GRU_SHORT).beats(at(RNN_SHORT)),
              at(RNN_SHORT, learned).beats(at(TRIGRAM, learned)))  # fmt: skip
    claims = [
        Claim('"Dhaval eats samosa ... his favourite cuisine is": samosa is kept, Indian', *told(1)),
        Claim('"His brother loves pasta and cheese; ...": samosa is let go, pasta is kept, Italian', *told(2)),
        Claim(
            "Two words of memory are too few: the GRU is better than a trigram", at(GRU).beats(at(TRIGRAM)),
            f"at a gap of {within} words GRU {at(GRU)}, trigram {at(TRIGRAM)}",
        ),
        Claim(
            "A basic RNN's memory is too short: the GRU is better, at equal hidden size and at equal parameters, and "
            f"where both are trained on gaps of {SHORT[0]} to {SHORT[-1]} words, which the RNN does learn", all(better),
            f"at {within} words GRU {at(GRU)}, RNN {at(RNN)} ({at(RNN, gaps[0])} at {gaps[0]}), with equal parameters "
            f"{at(RNN_EQUAL)}; trained on {SHORT[0]} to {SHORT[-1]}, at {', '.join(map(str, reach))} words: RNN {rnn}; "
            f"GRU {gru}",
        ),
        Claim(
            f"The GRU lets go as often as it must: {most} switches are no harder for it than none",
            switched(GRU).beats(switched(TRIGRAM)) and not switched(GRU, 0).beats(switched(GRU)),
            f"none {switched(GRU, 0)}, {most} switches {switched(GRU)}",
        ),
        Claim(
            "An LSTM keeps two states and three gates where the GRU keeps one and two",
            (STATES["LSTM"], GATES["LSTM"], STATES["GRU"], GATES["GRU"]) == (2, 3, 1, 2), "counted",
        ),
        *_beside_the_lstm(rows, beyond),
    ]  # fmt: skip
    long = max(beyond, default=within)
    for gate, trained, how in (("reset", n.NO_RESET, "r = 1"), ("update", n.NO_UPDATE, "z constant per unit")):
        pairs = (at(GRU), at(trained)), (at(GRU, long), at(trained, long)), (switched(GRU), switched(trained))
        claims.append(Claim(
            f"The {gate} gate is needed: a GRU that is trained without ({how}) is worse at {within} words, at {long} "
            f"or after {most} switches", any(mine.beats(theirs) for mine, theirs in pairs),
            f"without it {at(trained)} at {within} words (with it {at(GRU)}), {at(trained, long)} at {long} "
            f"({at(GRU, long)}), {switched(trained)} after {most} switches ({switched(GRU)})",
        ))  # fmt: skip
    return claims


def _beside_the_lstm(rows: Rows, beyond: Sequence[int]) -> list[Claim]:
    """Lighter, quicker, and at times less accurate."""
    sizes = [size_of(rows, cell.name) for cell in (GRU, LSTM)]
    gru, lstm = (n.cost(cell, s["input"], s["hidden"]) | s for cell, s in zip(("GRU", "LSTM"), sizes, strict=True))
    pairs = {name: (gru[name], lstm[name]) for name in ("parameters", "flops", "bytes")}
    times = [row for row in rows if row["measure"] == "time"]
    mine, theirs = (spread(float(str(row["value"])) for row in times if row["model"] == c.name) for c in (GRU, LSTM))
    places = [(gap, model) for gap in beyond for model in (LSTM.name, LSTM_EQUAL.name)]
    found = [(accuracy(rows, model, "gap", gap), accuracy(rows, GRU.name, "gap", gap)) for gap, model in places]
    best = max(range(len(found)), key=lambda i: found[i][0].mean - found[i][1].mean)
    gap, model = places[best]
    of_gru, of_lstm = (shares(rows, name, "gap", gap) for name in (GRU.name, model))
    won, lost = sum(a.beats(b) for a, b in found), sum(b.beats(a) for a, b in found)
    return [
        Claim(
            "The GRU is lighter than the LSTM of the same hidden size: parameters, flops and bytes of a step",
            all(less < more for less, more in pairs.values()),
            "counted: " + ", ".join(f"{name} {less:,} to {more:,}" for name, (less, more) in pairs.items()),
        ),
        Claim(
            "Its step takes less time than the LSTM's here, by PyTorch's own code on the CPU, not tritongru's kernels",
            theirs.beats(mine, 0.1 * theirs.mean),
            f"forward and backward {mine.mean:.0f} µs to {theirs.mean:.0f} µs; an LSTM may run as one oneDNN layer, a "
            "GRU as a loop of small operations",
        ),
        Claim(
            f"At times the LSTM is more accurate on long sequences: at one gap at least beyond {LONGEST} words",
            won > 0,
            f"it is at {won} of {len(found)} (gap, size), the GRU at {lost}; its best case: {model} {found[best][0]}, "
            f"GRU {found[best][1]} at {gap} words, where it has more right than the GRU in "
            f"{sum(of_lstm[seed] > share for seed, share in of_gru.items())} of {len(of_gru)} seeds",
        ),
    ]  # fmt: skip


def show(rows: Rows) -> None:
    """Print what was right at some gaps, and every claim with its numbers."""
    gaps = [gap for gap in gaps_of(rows) if gap in (7, 15, LONGEST, 60, 100, 200)]
    print("\nright at a gap of".ljust(54) + "".join(f"{gap:>11}" for gap in gaps))
    for model in n.MODELS:
        print(model.ljust(53) + "".join(f"{accuracy(rows, model, 'gap', gap)!s:>11}" for gap in gaps))
    print(
        f"By chance: one in {len(DISHES)}. Those trained on {SHORT[0]} to {SHORT[-1]} are asked in words they read."
        f"\n\nWhich claims of the story held\n{RULE}"
    )
    if len({row["seed"] for row in rows}) == 1:
        print("One seed has no spread: what sets networks apart here may be luck, and --seeds 5 would tell.")
    for claim in judge(rows):
        print(f"{'held  ' if claim.held else 'FAILED'} {claim.text}.\n       {claim.numbers}.")
