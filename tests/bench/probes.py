"""What one finished run says about a claim: a paired difference with its 95 % interval, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from flows.results.cells import ArmEvidence, Draws, gather
from flows.results.comparisons import REFERENCE
from flows.results.layers import layers_of, part_of
from flows.results.metrics import METRICS, difference_text, significant
from flows.results.read import Run
from flows.results.rows import RowScores
from flows.results.stats import Estimand, Interval, Sums, difference_intervals, studentized

DEQUANTIZED = "dequantized"
NO_BOUND = -100.0  # per cent: no perplexity falls by more
Outcome = Literal["shown", "refuted", "open"]


class Seen(NamedTuple):
    """One probe of one run.

    Attributes:
        text: The figure with its interval.
        agrees: The point estimate lies where the claim says; None for a claim of equality.
        outcome: The interval lies wholly where the claim says, wholly elsewhere, or on both sides.
        n: What it rests on.
    """

    text: str
    agrees: bool | None
    outcome: Outcome
    n: str


@dataclass(frozen=True)
class Evidence:
    """A run, read once, with the resamples that all its probes share."""

    run: Run
    arms: Mapping[str, ArmEvidence]
    draws: Draws = field(default_factory=Draws)

    @classmethod
    def of(cls, run: Run) -> Evidence:
        """Read the scores of every arm."""
        return cls(run, gather(run))

    def rows(self, slug: str, source: str) -> RowScores:
        """Scores of an arm.

        Raises:
            Missing: The run has no such scores.
        """
        one = self.arms.get(slug)
        if one is None or one.failure or one.unlike:
            raise Missing(f"{slug}: {(one and (one.failure or one.unlike)) or 'no such arm'}")
        if source not in one.scores:
            if slug == REFERENCE and source == "kl":
                return one.scores["nll"].zeros()
            raise Missing(f"{slug}: no {source}")
        return one.scores[source]

    def difference(self, a: Sums, b: Sums, groups: tuple[str, ...], *, link: Any = "mean") -> Difference:
        """a - b with the plain interval of one comparison."""
        one = studentized([Estimand(a, b, link)], self.draws(groups))[0]
        return Difference(one.estimate, difference_intervals([one])[0])


class Missing(Exception):
    """The run cannot say, and why."""


class Difference(NamedTuple):
    """An estimate with its interval."""

    value: float
    ci95: Interval


def within(ends: Interval, low: float, high: float) -> Outcome:
    """Whether an interval lies inside of a range, outside of it, or across one of its ends."""
    if low <= ends.low and ends.high <= high:
        return "shown"
    return "refuted" if ends.high < low or ends.low > high else "open"


def behind(rows: RowScores) -> str:
    """Rows, groups and, where they are others, tokens."""
    tokens = "" if rows.n == len(rows.rows) else f", {rows.n:,} tokens"
    return f"{len(rows.rows):,} rows in {len(rows.groups):,} groups{tokens}"


@dataclass(frozen=True)
class Better:
    """a is better than b on a metric: the sign of the difference; `merge` is the base that the run merged into."""

    a: str
    b: str
    metric: str = "kl_mean"
    merge: str = DEQUANTIZED

    @property
    def label(self) -> str:
        """What is subtracted from what."""
        where = "" if self.merge == DEQUANTIZED else f" (merged into the {self.merge} base)"
        return f"{METRICS[self.metric].label}, {self.a} − {self.b}{where}"

    def seen(self, evidence: Evidence) -> Seen:
        """The difference a - b."""
        metric = METRICS[self.metric]
        a, b = (evidence.rows(slug, metric.source or "") for slug in (self.a, self.b))
        found = evidence.difference(a.sums, b.sums, a.groups, link=metric.link)
        sign = -1 if metric.better == "lower" else 1
        gain = Interval(*sorted(sign * end for end in found.ci95))
        return Seen(
            text=difference_text(self.metric, found.value, list(found.ci95)),
            agrees=sign * found.value > 0,
            outcome="shown" if gain.low > 0 else ("refuted" if gain.high < 0 else "open"),
            n=behind(a),
        )


@dataclass(frozen=True)
class Equal(Better):
    """a and b are the same on a metric: refuted where they can be told apart; never shown."""

    def seen(self, evidence: Evidence) -> Seen:
        """The difference a - b."""
        found = super().seen(evidence)
        return found._replace(agrees=None, outcome="open" if found.outcome == "open" else "refuted")


@dataclass(frozen=True)
class Rise:
    """The perplexity of a lies between `low` and `high` per cent above that of b."""

    a: str
    b: str
    low: float
    high: float

    @property
    def label(self) -> str:
        """What is compared, and what is claimed."""
        claimed = f"below {self.high:g} %" if self.low == NO_BOUND else f"{self.low:g} to {self.high:g} %"
        return f"perplexity of {self.a} over {self.b} (claimed: {claimed})"

    def seen(self, evidence: Evidence) -> Seen:
        """exp(difference of the mean losses) - 1, in per cent."""
        a, b = (evidence.rows(slug, "nll") for slug in (self.a, self.b))
        found = evidence.difference(a.sums, b.sums, a.groups)
        value, low, high = (100 * float(np.expm1(one)) for one in (found.value, *found.ci95))
        return Seen(
            text=f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]".replace("-", "−"),
            agrees=self.low <= value <= self.high,
            outcome=within(Interval(low, high), self.low, self.high),
            n=behind(a),
        )


@dataclass(frozen=True)
class Adds:
    """What a KV cache costs on quantized weights is what it costs on bf16 ones: the difference of the differences."""

    quantized: str
    plain: str
    kv: str

    @property
    def label(self) -> str:
        """The four arms."""
        return f"loss, ({self.quantized}.{self.kv} − {self.quantized}) − ({self.plain}.{self.kv} − {self.plain})"

    def seen(self, evidence: Evidence) -> Seen:
        """Zero where the two add up; told apart where the interval leaves zero out."""
        rows = evidence.rows(self.quantized, "nll")

        def cost(slug: str) -> Sums:
            after, before = (evidence.rows(one, "nll").sums for one in (f"{slug}.{self.kv}", slug))
            return Sums(after.total - before.total, before.count)

        found = evidence.difference(cost(self.quantized), cost(self.plain), rows.groups)
        apart = not found.ci95.low <= 0 <= found.ci95.high
        text = difference_text("kl_mean", found.value, list(found.ci95))
        return Seen(text, None, "refuted" if apart else "open", behind(rows))


@dataclass(frozen=True)
class Variance:
    """Attention's weights vary more than the FFN's, layer by layer."""

    arm: str

    @property
    def label(self) -> str:
        """What is divided by what."""
        return "mean square of attention's weights over that of the FFN's, median of the layers"

    def seen(self, evidence: Evidence) -> Seen:
        """Ratio of mean squares, from what quantize recorded about the weights before."""
        known = layers_of(evidence.run).get(self.arm)
        if known is None:
            raise Missing(f"{self.arm}: no record of its layers")
        by_layer: dict[int, dict[str, float]] = {}
        for block in known["blocks"]:
            by_layer.setdefault(block["layer"], {})[part_of(block)] = block["weight_std"] ** 2
        ratios = [one["attention"] / one["FFN"] for one in by_layer.values()]
        higher = sum(ratio > 1 for ratio in ratios)
        outcome: Outcome = "shown" if higher == len(ratios) else ("open" if higher else "refuted")
        text = f"{significant(float(np.median(ratios)))}; above 1 in {higher} of {len(ratios)} layers"
        return Seen(text, float(np.median(ratios)) > 1, outcome, f"{len(ratios)} layers")


Probe = Better | Equal | Rise | Adds | Variance


def verdict(probe: Probe, seen: list[Seen]) -> str:
    """What all seeds together say, from the intervals and nothing else."""
    n = len(seen)
    if not n:
        return "not measured"
    count = {word: sum(one.outcome == word for one in seen) for word in ("shown", "refuted", "open")}
    if isinstance(probe, Equal):
        return f"told apart in {count['refuted']} of {n} seeds"
    if isinstance(probe, Adds):
        return f"another sum than the two costs in {count['refuted']} of {n} seeds"
    agree = sum(bool(one.agrees) for one in seen)
    if isinstance(probe, Rise):
        inside, outside = count["shown"], count["refuted"]
        return f"inside the claimed range in {agree} of {n} seeds; all of the interval in {inside}, none in {outside}"
    return f"as claimed in {agree} of {n} seeds; shown in {count['shown']}, the opposite shown in {count['refuted']}"
