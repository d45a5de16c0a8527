"""The published metrics: what each means, which direction is better, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flows.results.stats import Link
from recipes.arms import NOT_DECODED

Direction = Literal["lower", "higher"]
Interval95 = Literal["studentized", "wilson", "percentile", "repeats", "counted"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of report.json.

    Attributes:
        name: Key in `arms.<slug>.metrics`; never renamed or redefined.
        label: Column heading.
        better: Which direction is better.
        source: Metric in scores.parquet that it is made from; None where it is not made from scores.
        split: `test` or `general`; None where no split is behind it.
        interval: How ci95 is made (flows/results/stats.py).
        meaning: One line for the reader.
    """

    name: str
    label: str
    better: Direction
    source: str | None
    split: str | None
    interval: Interval95
    meaning: str

    @property
    def link(self) -> Link:
        """Perplexities are exponentials of means, proportions are shares, the rest are means."""
        if self.name.startswith("ppl"):
            return "exp"
        return "share" if self.interval == "wilson" else "mean"


TASK = "task."  # begins the metric of every scorer but the first


class Known(dict[str, Metric]):
    """The metrics of every run, by name; `task.NAME` of a recipe's further scorers is made when it is asked for."""

    def __missing__(self, name: str) -> Metric:
        """The metric of a further scorer.

        Raises:
            KeyError: It is no such name.
        """
        if not name.startswith(TASK):
            raise KeyError(name)
        return Metric(
            name=name,
            label=name,
            better="higher",
            source=name,
            split="test",
            interval="wilson",
            meaning=f"mean score from 0 to 1 of the scorer `{name.removeprefix(TASK)}` over test answers, decoded "
            "greedily; of lm-eval tasks: over their documents",
        )


METRICS = Known(
    (one.name, one)
    for one in (
        Metric(
            name="task",
            label="task",
            better="higher",
            source="task",
            split="test",
            interval="wilson",
            meaning="share of test answers that the recipe's scorer accepts, decoded greedily",
        ),
        Metric(
            name="truncated",
            label="cut off",
            better="lower",
            source="truncated",
            split="test",
            interval="wilson",
            meaning="share of test answers without an end, which score 0: cut off at evaluate.max_new_tokens, or "
            "thinking that never ends",
        ),
        Metric(
            name="ppl_test",
            label="perplexity",
            better="lower",
            source="nll",
            split="test",
            interval="studentized",
            meaning="exp of the mean loss over completion tokens of test",
        ),
        Metric(
            name="ppl_all",
            label="ppl, all",
            better="lower",
            source="nll_all",
            split="test",
            interval="studentized",
            meaning="exp of the mean loss over all tokens of test, prompts and template included, but each row's first",
        ),
        Metric(
            name="bits_per_byte",
            label="bits/byte",
            better="lower",
            source="bits",
            split="test",
            interval="studentized",
            meaning="bits that the completions of test cost, a byte of their text: compares models of any tokenizer",
        ),
        Metric(
            name="ppl_general",
            label="general ppl",
            better="lower",
            source="nll_general",
            split="general",
            interval="studentized",
            meaning="exp of the mean loss on text outside the domain: rises when the model forgets",
        ),
        Metric(
            name="kl_mean",
            label="KL",
            better="lower",
            source="kl",
            split="test",
            interval="studentized",
            meaning="mean KL(nf4-adapter || arm) over completion tokens of test, in nats",
        ),
        Metric(
            name="kl_p99",
            label="KL p99",
            better="lower",
            source="kl",
            split="test",
            interval="percentile",
            meaning="99th percentile over completion tokens of the same KL, in nats",
        ),
        Metric(
            name="top1_agreement",
            label="top-1",
            better="higher",
            source="agree",
            split="test",
            interval="wilson",
            meaning="share of completion tokens where arm and nf4-adapter agree on the likeliest token",
        ),
        Metric(
            name="size_bytes",
            label="size",
            better="lower",
            source=None,
            split=None,
            interval="counted",
            meaning="bytes that a server must fetch: weights, config and tokenizer, and the adapter where there is one",
        ),
        Metric(
            name="resident_bytes",
            label="resident",
            better="lower",
            source=None,
            split=None,
            interval="counted",
            meaning="bytes of parameters and buffers after loading",
        ),
        Metric(
            name="load_s",
            label="load",
            better="lower",
            source=None,
            split=None,
            interval="repeats",
            meaning="seconds from files to a model that is ready",
        ),
        Metric(
            name="prefill_tokens_per_s",
            label="prefill",
            better="higher",
            source=None,
            split=None,
            interval="repeats",
            meaning="prompt tokens a second",
        ),
        Metric(
            name="decode_tokens_per_s",
            label="decode",
            better="higher",
            source=None,
            split=None,
            interval="repeats",
            meaning="generated tokens a second",
        ),
    )
)
SERVED = {
    one.name: one
    for one in (
        Metric(
            name="served_loss",
            label="served loss",
            better="lower",
            source="served_nll",
            split="test",
            interval="studentized",
            meaning="mean loss over completion tokens of test in the engine, nats a token",
        ),
        Metric(
            name="served_task",
            label="served task",
            better="higher",
            source="served_task",
            split="test",
            interval="wilson",
            meaning="share of the engine's test answers that the recipe's scorer accepts, decoded greedily",
        ),
        Metric(
            name="served_answers_equal",
            label="answers equal",
            better="higher",
            source="served_equal",
            split="test",
            interval="wilson",
            meaning="share of test answers that are, letter by letter, those of the arm's own evaluation",
        ),
        Metric(
            name="served_truncated",
            label="served cut off",
            better="lower",
            source="served_truncated",
            split="test",
            interval="wilson",
            meaning="share of the engine's test answers without an end, which score 0",
        ),
    )
}  # what a real engine gave: only of runs that served something
HEADLINE = ("task", "ppl_test", "kl_mean", "size_bytes")  # an arm without one of these is not ranked
SPEED = ("resident_bytes", "load_s", "prefill_tokens_per_s", "decode_tokens_per_s")
PER_DOMAIN = ("task", "ppl_test", "ppl_all", "bits_per_byte", "kl_mean", "top1_agreement")
NOT_COUNTED = "not counted: an older version scored it, which took answers without an end as finished"
_SHARES = ("task", "truncated", "top1_agreement", "served_task", "served_answers_equal", "served_truncated")
_MINUS = "−"


def further(recipe: Mapping[str, Any]) -> list[Metric]:
    """Metrics of all scorers of a resolved recipe but the first, in its order."""
    scorers = (recipe.get("evaluate") or {}).get("scorers") or []
    return [METRICS[f"{TASK}{scorer.get('name') or scorer['kind']}"] for scorer in scorers[1:]]


def is_task(metric: str) -> bool:
    """The score of a scorer, the first or a further one."""
    return metric == "task" or metric.startswith(TASK)


def _base(metric: str) -> str:
    """The metric without its domain; all task scores are written alike."""
    return "task" if metric.startswith(TASK) else metric.split("@")[0]


def _unit(metric: str) -> str:
    """What stands behind a number of this metric."""
    return {
        "task": " %",
        "truncated": " %",
        "served_truncated": " %",
        "top1_agreement": " %",
        "served_task": " %",
        "served_answers_equal": " %",
        "served_loss": " nats",
        "kl_mean": " nats",
        "kl_p99": " nats",
        "load_s": " s",
        "prefill_tokens_per_s": " tok/s",
        "decode_tokens_per_s": " tok/s",
        "output_tokens_per_s": " tok/s",
    }.get(_base(metric), "")


def decimals(half_width: float, *, digits: int = 2) -> int:
    """Decimal places that show `digits` significant digits of an interval's half-width."""
    if not math.isfinite(half_width) or half_width <= 0:
        return 3
    return min(12, max(0, digits - 1 - math.floor(math.log10(half_width))))


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, never in exponents between 1e-7 and 1e9."""
    if value == 0:
        return "0"
    if not 1e-7 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}e}".replace("-", _MINUS)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".replace("-", _MINUS)


def size(value: float) -> str:
    """Bytes in decimal MB or GB."""
    return f"{significant(value / 1e9)} GB" if value >= 1e9 else f"{significant(value / 1e6)} MB"


def _scaled(metric: str, value: float) -> float:
    return value * 100 if _base(metric) in _SHARES else value


def _places(metric: str, value: float, ci95: list[float] | tuple[float, float] | None) -> int:
    if ci95 is None or ci95[1] <= ci95[0]:
        return 1 if _base(metric) in _SHARES else max(0, 2 - math.floor(math.log10(abs(value))) if value else 0)
    return max(decimals(_scaled(metric, ci95[1] - ci95[0]) / 2), int(_base(metric) in _SHARES))


def _plain(value: float, places: int) -> str:
    if abs(value) >= 1e6:
        return f"{value:.2e}".replace("e+0", "e").replace("e+", "e").replace("-", _MINUS)
    text = f"{value:,.{places}f}"
    return text.replace("-", _MINUS) if float(text.replace(",", "")) else f"{0:.{places}f}"


def value_text(metric: str, value: float | None, ci95: list[float] | None = None, *, unit: bool = False) -> str:
    """A metric's value with as many digits as its interval supports; `-` where there is none."""
    if value is None:
        return "–"
    if _base(metric) in ("size_bytes", "resident_bytes"):
        return size(value)
    if ci95 is None and _base(metric) not in _SHARES:
        return significant(value) + (_unit(metric) if unit else "")
    text = _plain(_scaled(metric, value), _places(metric, value, ci95))
    return text + (_unit(metric) if unit else "")


def absent_text(reason: str | None) -> str:
    """What stands in the cell of a metric that an arm has no value of."""
    return reason.partition(":")[0] if reason in (NOT_COUNTED, NOT_DECODED) else value_text("", None)


def interval_text(metric: str, value: float | None, ci95: list[float] | None) -> str:
    """`[low, high]` with the digits of the value, or nothing where there is no interval worth showing."""
    if value is None or ci95 is None or _base(metric) in ("size_bytes", "resident_bytes"):
        return ""
    places = _places(metric, value, ci95)
    return f"[{_plain(_scaled(metric, ci95[0]), places)}, {_plain(_scaled(metric, ci95[1]), places)}]"


def difference_text(metric: str, difference: float, ci95: list[float]) -> str:
    """`+1.2 [-0.3, +2.7] points`: a signed difference with its interval and unit."""
    places = _places(metric, difference, ci95)
    shown = [_signed(_scaled(metric, number), places) for number in (difference, *ci95)]
    unit = " points" if _base(metric) in _SHARES else _unit(metric)
    return f"{shown[0]} [{shown[1]}, {shown[2]}]{unit}"


def _signed(value: float, places: int) -> str:
    text = _plain(value, places)
    return text if text.startswith(_MINUS) or float(text.replace(",", "")) == 0 else f"+{text}"
