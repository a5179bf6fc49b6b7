"""What the story says of these networks, held against the rows of the trained ones. The rule stands before the result.

One network is better than another where the mean accuracies over the seeds are further apart than both standard
deviations together, and than two points in a hundred. A completion is right where every seed's is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .networks import (
    AVERAGED,
    CLAMPED,
    GRU,
    GRU_SHORT,
    LSTM,
    LSTM_EQUAL,
    NETWORKS,
    NO_RESET,
    NO_UPDATE,
    RNN,
    RNN_EQUAL,
    RNN_SHORT,
    SHORT,
    STATES,
    TRAINED,
    TRIGRAM,
    flops,
    gates_of,
    step_bytes,
)

Rows = Sequence[Mapping[str, object]]
LONGEST = TRAINED[-1]  # the longest gap that was trained on
LEAST = 0.02  # a difference that anybody would care about
RULE = (
    "Better means: the means over the seeds differ by more than both standard deviations together and by more than "
    f"{100 * LEAST:.0f} points in 100. A completion is right if it is in every seed."
)


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    deviation: float  # 0 of one seed
    seeds: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f} %" if self.seeds > 1 else f"{100 * self.mean:.1f} %"

    @property
    def short(self) -> str:
        """In whole points of 100."""
        return f"{100 * self.mean:.0f} ± {100 * self.deviation:.0f}" if self.seeds > 1 else f"{100 * self.mean:.0f}"

    def beats(self, other: Spread) -> bool:
        return self.mean - other.mean > max(self.deviation + other.deviation, LEAST)


@dataclass(frozen=True)
class Claim:
    """A sentence of the story, whether it held, and by which numbers."""

    text: str
    held: bool
    numbers: str


def spread(values: Iterable[float]) -> Spread:
    found = list(values)
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def shares(rows: Rows, model: str, measure: str, at: int) -> dict[str, float]:
    """Share of right answers by seed of a model at a gap, at a number of switches, or to a sentence of the story.

    Raises: ValueError without such rows.
    """
    found = {
        str(row["seed"]): int(str(row["right"])) / int(str(row["asked"]))
        for row in rows
        if (row["model"], row["measure"], str(row["at"])) == (model, measure, str(at))
    }
    if not found:
        raise ValueError(f"no rows of {model!r} for {measure} {at}")
    return found


def accuracy(rows: Rows, model: str, measure: str, at: int) -> Spread:
    """Those shares over the seeds.

    Raises: ValueError without such rows.
    """
    return spread(shares(rows, model, measure, at).values())


def whole(rows: Rows) -> Rows:
    """The rows of seeds of which every network has ended: a run that was interrupted leaves others too."""
    expected = {*(network.name for network in NETWORKS), CLAMPED, AVERAGED, TRIGRAM}
    found: dict[object, set[object]] = {}
    for row in rows:
        found.setdefault(row["seed"], set()).add(row["model"])
    return [row for row in rows if found[row["seed"]] >= expected]


def gaps_of(rows: Rows, measure: str = "gap") -> list[int]:
    """The gaps (or numbers of switches) that were asked for."""
    return sorted({int(str(row["at"])) for row in rows if row["measure"] == measure})


def size_of(rows: Rows, model: str) -> dict[str, int]:
    """Input, hidden size and parameters of a model."""
    row = next(row for row in rows if row["model"] == model)
    return {name: int(str(row[name])) for name in ("input", "hidden", "parameters")}


def measured_time(rows: Rows, model: str) -> Spread:
    """CPU microseconds per timestep of forward and backward."""
    return spread(float(str(r["value"])) for r in rows if (r["model"], r["measure"]) == (model, "time"))


def judge(rows: Rows) -> list[Claim]:
    """Every claim of the story, in its order."""
    gaps = gaps_of(rows)
    within = max(gap for gap in gaps if gap <= LONGEST)
    beyond = [gap for gap in gaps if gap > LONGEST]
    most = max(gaps_of(rows, "switches"))

    def at(model: str, gap: int = within) -> Spread:
        return accuracy(rows, model, "gap", gap)

    def switched(model: str, number: int = most) -> Spread:
        return accuracy(rows, model, "switches", number)

    def told(sentence: int) -> tuple[bool, str]:
        found = accuracy(rows, GRU.name, "story", sentence)
        return found.mean == 1, f"right in {round(found.mean * found.seeds)} of {found.seeds} seeds"

    gru, first, second = GRU.name, told(1), told(2)
    shorter, shorter_equal = at(RNN.name), at(RNN_EQUAL.name)
    keeps = any(at(model, gaps[0]).beats(at(TRIGRAM, gaps[0])) for model in (RNN.name, RNN_EQUAL.name))
    nothing = f" (over gaps of up to {LONGEST} it learns to hold no dish: {at(RNN.name, gaps[0])} at {gaps[0]})"
    learned = max(gap for gap in gaps if gap <= SHORT[-1])
    reach = [gap for gap in gaps if learned <= gap <= within]

    def reaches(model: str) -> str:
        return ", ".join(str(at(model, gap)) for gap in reach)

    claims = [
        Claim('"Dhaval eats samosa ... his favourite cuisine is": samosa is kept, Indian', *first),
        Claim('"His brother loves pasta and cheese; ...": samosa is let go, pasta is kept, Italian', *second),
        Claim(
            "Two words of memory are too few: the GRU is better than a trigram",
            at(gru).beats(at(TRIGRAM)),
            f"at a gap of {within} words GRU {at(gru)}, trigram {at(TRIGRAM)}",
        ),
        Claim(
            "A basic RNN's memory is too short: the GRU is better, at equal hidden size and at equal parameters, and "
            f"where both are trained on gaps of {SHORT[0]} to {SHORT[-1]} words, which the RNN does learn",
            at(gru).beats(shorter)
            and at(gru).beats(shorter_equal)
            and at(RNN_SHORT.name, learned).beats(at(TRIGRAM, learned))
            and at(GRU_SHORT.name).beats(at(RNN_SHORT.name)),
            f"at {within} words GRU {at(gru)}, RNN {shorter}, with the GRU's parameters {shorter_equal}"
            f"{'' if keeps else nothing}; trained on {SHORT[0]} to {SHORT[-1]}, at {', '.join(map(str, reach))} words: "
            f"RNN {reaches(RNN_SHORT.name)}; GRU {reaches(GRU_SHORT.name)}",
        ),
        Claim(
            f"The GRU lets go as often as it must: {most} switches are no harder for it than none",
            switched(gru).beats(switched(TRIGRAM)) and not switched(gru, 0).beats(switched(gru)),
            f"none {switched(gru, 0)}, {most} switches {switched(gru)}",
        ),
        Claim(
            "An LSTM keeps two states and three gates where the GRU keeps one and two",
            (STATES["LSTM"], gates_of("LSTM"), STATES["GRU"], gates_of("GRU")) == (2, 3, 1, 2),
            f"counted: LSTM {STATES['LSTM']} states, {gates_of('LSTM')} gates; GRU {STATES['GRU']} state, "
            f"{gates_of('GRU')} gates",
        ),
        _lighter(rows),
        _quicker(rows),
        _longer(rows, beyond),
    ]
    for gate, trained, clamped, how in (
        ("reset", NO_RESET.name, CLAMPED, "r = 1"), ("update", NO_UPDATE.name, AVERAGED, "z constant per unit"),
    ):  # fmt: skip
        long = max(beyond, default=within)
        needed = any(mine.beats(theirs) for mine, theirs in (
            (at(gru), at(trained)), (at(gru, long), at(trained, long)), (switched(gru), switched(trained))
        ))  # fmt: skip
        claims.append(
            Claim(
                f"The {gate} gate is needed: a GRU that is trained without ({how}) is worse at "
                f"{within} words, at {long} or after {most} switches",
                needed,
                f"without it {at(trained)} at {within} words (with it {at(gru)}), {at(trained, long)} at {long} "
                f"({at(gru, long)}), {switched(trained)} after {most} switches ({switched(gru)}); taken from the "
                f"trained GRU: {at(clamped)} at {within} words",
            )
        )
    return claims


def _lighter(rows: Rows) -> Claim:
    gru, lstm = size_of(rows, GRU.name), size_of(rows, LSTM.name)
    I, H = gru["input"], gru["hidden"]
    pairs = {
        "parameters": (gru["parameters"], lstm["parameters"]),
        "flops": (flops("GRU", I, H), flops("LSTM", I, H)),
        "bytes": (step_bytes("GRU", I, H), step_bytes("LSTM", I, H)),
    }
    counted = [(f"{name} {mine:,} to {theirs:,}", mine < theirs) for name, (mine, theirs) in pairs.items()]
    return Claim(
        "The GRU is lighter than the LSTM of the same hidden size: parameters, flops and bytes of a step",
        all(less for _, less in counted),
        "counted: " + ", ".join(text for text, _ in counted),
    )


def _quicker(rows: Rows) -> Claim:
    """The same rule, with a tenth for what nobody would care about."""
    mine, theirs = measured_time(rows, GRU.name), measured_time(rows, LSTM.name)
    return Claim(
        "Its step takes less time than the LSTM's here, by PyTorch's own code on the CPU, not tritongru's kernels",
        theirs.mean - mine.mean > max(mine.deviation + theirs.deviation, 0.1 * theirs.mean),
        f"forward and backward {mine.mean:.0f} µs to {theirs.mean:.0f} µs; an LSTM may run as one oneDNN layer, a "
        "GRU as a loop of small operations",
    )


def _longer(rows: Rows, beyond: Sequence[int]) -> Claim:
    found = [
        (gap, model, accuracy(rows, model, "gap", gap), accuracy(rows, GRU.name, "gap", gap))
        for gap in beyond
        for model in (LSTM.name, LSTM_EQUAL.name)
    ]
    won = [(gap, model) for gap, model, theirs, mine in found if theirs.beats(mine)]
    gap, model, theirs, mine = max(found, key=lambda entry: entry[2].mean - entry[3].mean)
    lost = sum(mine.beats(theirs) for _, _, theirs, mine in found)
    of_gru, of_lstm = (shares(rows, name, "gap", gap) for name in (GRU.name, model))
    more = sum(of_lstm[seed] > share for seed, share in of_gru.items())
    return Claim(
        f"At times the LSTM is more accurate on long sequences: at one gap at least beyond {LONGEST} words",
        bool(won),
        f"it is at {len(won)} of {len(found)} (gap, size), the GRU at {lost}; its best case: {model} {theirs}, "
        f"GRU {mine} at {gap} words, where it has more right than the GRU in {more} of {len(of_gru)} seeds",
    )
