"""The report's answers in words. Every figure stands with its interval, every word follows from ci95_adjusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.results.cells import Cell
from flows.results.comparisons import FAMILIES, REFERENCE, Comparison, LeftOut
from flows.results.flips import swapped_flips
from flows.results.metrics import decimals, difference_text, interval_text, significant, size, value_text
from flows.results.read import RunArm
from recipes.checks.power import TOO_FEW_GROUPS

UNKNOWN = "No difference that this much data can show"
_NEARER = {  # by verdict on KL
    "better": "stays closer to {reference} than",
    "worse": "is further from {reference} than",
    "no difference shown": "shows no difference from",
}
_NOUN = {
    "task": "task score",
    "ppl_test": "perplexity",
    "ppl_general": "general perplexity",
    "kl_mean": "KL",
    "bits_per_byte": "bits a byte",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question of the report.

    Attributes:
        question: As its family asks it.
        short: One sentence for the top of the page.
        text: All of it, sentences.
        known: The run can say it.
    """

    question: str
    short: str
    text: tuple[str, ...]
    known: bool = True


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the answers are made from.

    Attributes:
        choice: The result of the choose step; None where it was not made.
        error_over_delta: What the merge into the dequantized base measured (tasks/jobs/merging/weight_error.py).
        adapter: Where the train step says that the adapter came from; None where it was trained in this pipeline.
        reference: Slug of what KL is measured against; None without one.
    """

    arms: Mapping[str, RunArm]
    cells: Mapping[str, Mapping[str, Cell]]
    ranked: frozenset[str]
    comparisons: Sequence[Comparison]
    left_out: Sequence[LeftOut] = ()
    choice: Mapping[str, Any] | None = None
    error_over_delta: Mapping[str, Any] | None = None
    adapter: Mapping[str, Any] | None = None
    reference: str | None = REFERENCE

    @property
    def reference_text(self) -> str:
        """What KL is measured against, in words."""
        return "the trained model" if self.reference == REFERENCE else str(self.reference)

    def nearer(self, verdict: str) -> str:
        """`stays closer to the trained model than`, by verdict on KL."""
        return _NEARER[verdict].format(reference=self.reference_text)

    def pair(self, a: str, b: str, metric: str) -> Comparison | None:
        """The comparison of a with b, whichever of the two came first."""
        for comparison in self.comparisons:
            if comparison.metric == metric and {comparison.a, comparison.b} == {a, b}:
                return comparison if comparison.a == a else swapped(comparison)
        return None

    def lacking(self, otherwise: str, *metrics: str) -> str:
        """Why a question has no answer: too few groups, where that kept arms from being compared on these metrics."""
        reasons = (one.reason for one in self.left_out if one.metric in metrics)
        return next((reason for reason in reasons if reason.startswith(TOO_FEW_GROUPS)), otherwise)

    def pairs(self, a: str, b: str, *metrics: str) -> list[Comparison]:
        """The comparisons of a with b on these metrics, where there are any."""
        return [comparison for metric in metrics if (comparison := self.pair(a, b, metric))]

    def shown(self, slug: str, metric: str) -> str:
        """`90.7 % [86.1, 93.8]`."""
        cell = self.cells[slug][metric]
        ci95 = None if cell.ci95 is None else list(cell.ci95)
        text = value_text(metric, cell.value, ci95, unit=True)
        return f"{text} {interval_text(metric, cell.value, ci95)}".rstrip()

    def bytes_of(self, slug: str) -> float:
        """size_bytes of a ranked arm."""
        return self.cells[slug]["size_bytes"].value or 0.0


def swapped(comparison: Comparison) -> Comparison:
    """The same comparison from b's side."""
    flip = {"better": "worse", "worse": "better"}.get(comparison.verdict, comparison.verdict)
    more: dict[str, Any] = {
        **vars(comparison),
        "a": comparison.b,
        "b": comparison.a,
        "difference": -comparison.difference,
        "ci95": type(comparison.ci95)(-comparison.ci95.high, -comparison.ci95.low),
        "ci95_adjusted": type(comparison.ci95)(-comparison.ci95_adjusted.high, -comparison.ci95_adjusted.low),
        "verdict": flip,
        "flips": swapped_flips(comparison.flips),
    }
    return Comparison(**more)


def _difference(comparison: Comparison) -> str:
    return difference_text(comparison.metric, comparison.difference, list(comparison.ci95_adjusted))


def _sentence(comparison: Comparison) -> str:
    """`task score +1.2 [-0.3, +2.7] points: no difference shown`."""
    return f"{_NOUN[comparison.metric]} {_difference(comparison)}: {comparison.verdict}"


def answers(facts: Findings) -> tuple[Answer, ...]:
    """The questions in the order of the families; those for controls and external models only where there are any."""
    question = {family.name: family.question for family in FAMILIES}
    controlled = any(arm.is_control for arm in facts.arms.values())
    return (
        _fine_tuning(facts, question["fine-tuning"]),
        _merge(facts, question["merge"]),
        _scheme(facts, question["schemes"]),
        _merge_first(facts, question["merge-first"]),
        *([_calibration(facts, question["calibration"])] if controlled else []),
        *([_external(facts, question["external"])] if any(arm.external for arm in facts.arms.values()) else []),
    )


def _cannot(question: str, why: str) -> Answer:
    text = f"This run cannot say: {why}."
    return Answer(question=question, short=text, text=(text,), known=False)


def _fine_tuning(facts: Findings, question: str) -> Answer:
    main = facts.pair(REFERENCE, "base", "task") or facts.pair(REFERENCE, "base", "ppl_test")
    if main is None:
        return _cannot(question, facts.lacking("base or nf4-adapter has no scores", "task", "ppl_test"))
    metric, noun = main.metric, _NOUN[main.metric]
    if main.verdict == "no difference shown":
        short = f"{UNKNOWN}: fine-tuning moved the {noun} by {_difference(main)}."
    else:
        way = "lifted" if main.difference > 0 else "lowered"
        before, after = (value_text(metric, facts.cells[slug][metric].value, unit=True) for slug in ("base", REFERENCE))
        short = f"Fine-tuning {way} the {noun} from {before} to {after}: {_difference(main)}."
    text = []
    if metric == "task":
        text.append(f"base answers {facts.shown('base', 'task')}, nf4-adapter {facts.shown(REFERENCE, 'task')}.")
    text.append(f"nf4-adapter against base: {_sentence(main)}.")
    for metric, where in (("ppl_test", "On completions"), ("ppl_general", "On text outside the domain (forgetting)")):
        if comparison := facts.pair(REFERENCE, "base", metric):
            text.append(
                f"{where}: perplexity {facts.shown('base', metric)} before, {facts.shown(REFERENCE, metric)} after, "
                f"{_difference(comparison)}: {comparison.verdict}."
            )
    return Answer(question=question, short=short, text=tuple(text))


def _merge(facts: Findings, question: str) -> Answer:
    between = facts.pair("merged-dequantized", "merged-original", "kl_mean")
    text = _decided(facts)
    named = len(text)
    for slug in ("merged-dequantized", "merged-original"):
        parts = [_sentence(comparison) for comparison in facts.pairs(slug, REFERENCE, "task", "ppl_test")]
        if slug in facts.ranked:
            figures = "; ".join([f"KL {facts.shown(slug, 'kl_mean')} to {facts.reference_text}", *parts])
            text.append(f"{slug}: {figures}.")
    few = facts.lacking("", "kl_mean")
    if between is None and few:
        told = _cannot(question, few)
        return Answer(question=question, short=told.short, text=(*told.text, *text), known=False)
    if between is None:
        return (
            _cannot(question, "one of the merged models has no scores")
            if len(text) == named
            else Answer(question=question, short=text[named], text=tuple(text))
        )
    text.append(f"merged-dequantized against merged-original: {_sentence(between)}.")
    text += _beside(facts)
    reference = facts.reference_text
    short = {
        "better": f"Merging into the dequantized base stays closer to {reference} (KL {_difference(between)}).",
        "worse": f"Merging into the original base stays closer to {reference} (KL {_difference(between)}).",
    }.get(between.verdict, f"{UNKNOWN} between the two merge bases (KL {_difference(between)}).")
    return Answer(question=question, short=short, text=tuple(text))


def _decided(facts: Findings) -> list[str]:
    """Which merge the schemes quantize, and why: the recipe names it, or the figures on dev do."""
    choice = facts.choice
    if choice is None:
        return []
    if "rule" not in choice:
        return [f"The schemes quantize merged-{choice['candidate']}: the recipe names it (merge.base)."]
    if "undecided" in choice:
        return [
            f"The schemes quantize merged-{choice['candidate']}. This run could not decide (merge.base: auto): "
            f"{choice['undecided']}. Rule: {choice['rule']}."
        ]
    losses, ci95 = choice["loss"], choice["ci95"]
    if ci95 is None:
        figures = "of one group only, so nothing can be told"
    else:
        places = decimals((ci95[1] - ci95[0]) / 2)
        figures = " against ".join(f"{losses[base]:.{places}f} ({base})" for base in ("dequantized", "original"))
        figures += f", difference {difference_text('kl_mean', choice['difference'], ci95)} a token"
    return [
        f"The schemes quantize merged-{choice['candidate']}, chosen by this run (merge.base: auto): loss on dev "
        f"{figures}; {choice['tokens']:,} tokens of {choice['rows']:,} rows in {choice['groups']:,} groups. "
        f"Rule: {choice['rule']}."
    ]


def _beside(facts: Findings) -> list[str]:
    """What is shown beside the choice and decides nothing."""
    text: list[str] = []
    if ratio := facts.error_over_delta:
        kinds = ", ".join(f"{kind} {significant(errors['median'], 2)}" for kind, errors in ratio["by_kind"].items())
        text.append(
            f"What NF4 changed in a weight against what the adapter changes, ||W − NF4(W)|| / ||delta||: median "
            f"{significant(ratio['median'], 2)} of {ratio['modules']} modules, largest {significant(ratio['max'], 2)} "
            f"({ratio['max_module']}); medians by kind: {kinds}. It decides nothing."
        )
    if facts.adapter and facts.reference == REFERENCE:
        text.append(
            f"The adapter was trained elsewhere; the weights under it there: {facts.adapter['provenance']}. KL is "
            "measured against it on NF4 weights: where it was trained on others, KL favours the dequantized base."
        )
    return text


def _schemes(facts: Findings) -> list[str]:
    """Ranked schemes on the merged model, smallest KL first."""
    merged = [
        slug
        for slug in facts.ranked
        if (arm := facts.arms[slug]).scheme and not arm.on_base and not arm.is_control and arm.kv is None
    ]
    return sorted(merged, key=lambda slug: (facts.cells[slug]["kl_mean"].value or 0.0, slug))


def _beaten(slug: str, others: Sequence[str], facts: Findings) -> str | None:
    """Another scheme of no more bytes whose KL is shown to be lower."""
    for other in others:
        comparison = facts.pair(other, slug, "kl_mean")
        if comparison and comparison.verdict == "better" and facts.bytes_of(other) <= facts.bytes_of(slug) * 1.001:
            return other
    return None


def _scheme(facts: Findings, question: str) -> Answer:
    schemes = _schemes(facts)
    if not schemes:
        return _cannot(question, "no scheme on the merged model has all its figures")
    few = facts.lacking("", "kl_mean")
    if few and not any(comparison.metric == "kl_mean" for comparison in facts.comparisons):
        return _cannot(question, few)
    beaten = {slug: by for slug in schemes if (by := _beaten(slug, schemes, facts))}
    front = [slug for slug in schemes if slug not in beaten]
    best = front[0]
    merged = f"merged-{facts.arms[best].merge_base}"
    share = facts.bytes_of(best) / facts.bytes_of(merged) if merged in facts.ranked else None
    of_merge = f", {share:.0%} of {merged}".replace("%", " %") if share else ""
    text = [f"{best} loses least: KL {facts.shown(best, 'kl_mean')}, {size(facts.bytes_of(best))}{of_merge}."]
    cost = facts.pair(best, merged, "task")
    if cost:
        text.append(f"Against {merged}: {_sentence(cost)}.")
    text += [_smaller(slug, best, facts) for slug in front[1:]]
    if beaten:
        lost = ", ".join(f"{slug} (by {by})" for slug, by in beaten.items())
        text.append(f"Beaten on KL by a scheme of no more bytes: {lost}.")
    equal = [
        slug for slug in front[1:] if _no_difference(slug, best, facts) and facts.bytes_of(slug) < facts.bytes_of(best)
    ]
    keeps = f"{best} keeps most: {size(facts.bytes_of(best))}{of_merge}, KL {facts.shown(best, 'kl_mean')}"
    costs = f", task score {_difference(cost)} against it ({cost.verdict})" if cost else ""
    beside = f"; {equal[0]} is smaller and not shown to be worse" if equal else ""
    return Answer(question=question, short=f"{keeps}{costs}{beside}.", text=tuple(text))


def _no_difference(a: str, b: str, facts: Findings) -> bool:
    comparison = facts.pair(a, b, "kl_mean")
    return comparison is not None and comparison.verdict == "no difference shown"


def _smaller(slug: str, best: str, facts: Findings) -> str:
    """What another scheme on the front saves and costs against the best one."""
    saved = 1 - facts.bytes_of(slug) / facts.bytes_of(best)
    if abs(saved) < 0.0005:
        bytes_ = "as large"
    else:
        bytes_ = f"{significant(abs(saved) * 100, 2)} % {'smaller' if saved > 0 else 'larger'}"
    parts = [_sentence(comparison) for comparison in facts.pairs(slug, best, "kl_mean", "task")]
    return f"{slug} is {bytes_}, KL {facts.shown(slug, 'kl_mean')}; against {best}: {'; '.join(parts)}."


def _merge_first(facts: Findings, question: str) -> Answer:
    pairs = [(slug, f"{slug}.on-base") for slug in _schemes(facts) if facts.pair(slug, f"{slug}.on-base", "kl_mean")]
    if not pairs:
        return _cannot(question, facts.lacking("no scheme was scored both ways", "kl_mean"))
    text: list[str] = []
    words: dict[str, list[str]] = {}
    for merged, on_base in pairs:
        both = facts.pairs(merged, on_base, "kl_mean", "task")
        words.setdefault(both[0].verdict, []).append(f"{_difference(both[0])} for {merged}")
        parts = [_sentence(comparison) for comparison in both]
        if on_base in facts.ranked:
            parts.append(f"{size(facts.bytes_of(merged))} against {size(facts.bytes_of(on_base))}")
        text.append(f"{merged} against {on_base}: {'; '.join(parts)}.")
    short = "; it ".join(
        f"{facts.nearer(word)} quantized base + adapter: KL {', '.join(of)}" for word, of in words.items()
    )
    return Answer(question=question, short=f"Merged-then-quantized {short}.", text=tuple(text))


def _calibration(facts: Findings, question: str) -> Answer:
    """Every scheme against its controls, KL for the short answer."""
    pairs = _pairs(facts, "calibration")
    if not pairs:
        return _cannot(question, facts.lacking("no scheme was scored beside its controls", "kl_mean"))
    text = [f"{a} against {b}: {'; '.join(map(_sentence, family))}." for (a, b), family in pairs.items()]
    words: dict[str, list[str]] = {}
    for (a, b), family in pairs.items():
        for comparison in family:
            if comparison.metric == "kl_mean":
                controlled = f"{_control(facts.arms[b])} for {a} (KL {_difference(comparison)})"
                words.setdefault(comparison.verdict, []).append(controlled)
    short = "; it ".join(f"{facts.nearer(word)} {', '.join(which)}" for word, which in words.items())
    return Answer(question=question, short=f"Calibration on the domain {short}.", text=tuple(text))


def _external(facts: Findings, question: str) -> Answer:
    """Every external model against ours; task score and bits a byte for the short answer."""
    pairs = _pairs(facts, "external")
    if not pairs:
        return _cannot(
            question,
            facts.lacking("no external model was scored on the same rows as one of ours", "task", "bits_per_byte"),
        )
    text: list[str] = []
    short: list[str] = []
    for (a, b), family in pairs.items():
        sizes = [known for slug in (a, b) if (known := facts.cells[slug]["size_bytes"].value) is not None]
        parts = [*map(_sentence, family), *([f"{size(sizes[0])} against {size(sizes[1])}"] if len(sizes) == 2 else [])]
        text.append(f"{a} against {b}: {'; '.join(parts)}.")
        short.append(f"{a} against {b}: {'; '.join(map(_sentence, family[:2]))}")
        reason = facts.cells[a]["ppl_test"].reason
        if reason and facts.cells[a]["ppl_test"].value is None:
            text.append(f"{a} has no perplexity and no KL: {reason}.")
    return Answer(question=question, short=f"{'; '.join(short)}.", text=tuple(text))


def _pairs(facts: Findings, family: str) -> dict[tuple[str, str], list[Comparison]]:
    """Two arms -> their comparisons in a family."""
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in facts.comparisons:
        if comparison.family == family:
            pairs.setdefault((comparison.a, comparison.b), []).append(comparison)
    return pairs


def _control(arm: RunArm) -> str:
    """What a scheme was calibrated on instead."""
    if arm.scales_from_base:
        return "scales found on the base"
    if arm.is_control:
        return {"generic": "general text", "mixed": "half general text", "random": "random tokens"}[arm.calibration]
    return "no calibration"
