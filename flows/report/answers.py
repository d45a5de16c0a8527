"""The report's answers in words. Every figure stands with its interval, every word follows from ci95_adjusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.results.cells import Cell
from flows.results.comparisons import FAMILIES, REFERENCE, Comparison
from flows.results.metrics import decimals, difference_text, interval_text, significant, size, value_text
from flows.results.read import RunArm

UNKNOWN = "No difference that this much data can show"
_NEARER = {  # by verdict on KL
    "better": "stays closer to {judge} than",
    "worse": "is further from {judge} than",
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
        choice: What the choose step said; None where it was not made.
        error_over_delta: What the merge into the dequantized base said about it (tasks/jobs/merging/weight_error.py).
        adapter: What the train step said about the adapter's origin; None where it was trained in this pipeline.
        reference: Slug of what KL is measured against; None without one.
    """

    arms: Mapping[str, RunArm]
    cells: Mapping[str, Mapping[str, Cell]]
    ranked: frozenset[str]
    comparisons: Sequence[Comparison]
    choice: Mapping[str, Any] | None = None
    error_over_delta: Mapping[str, Any] | None = None
    adapter: Mapping[str, Any] | None = None
    reference: str | None = REFERENCE

    @property
    def judge(self) -> str:
        """What KL is measured against, in words."""
        return "the trained model" if self.reference == REFERENCE else str(self.reference)

    def nearer(self, verdict: str) -> str:
        """`stays closer to the trained model than`, by verdict on KL."""
        return _NEARER[verdict].format(judge=self.judge)

    def pair(self, a: str, b: str, metric: str) -> Comparison | None:
        """The comparison of a with b, whichever of the two came first."""
        for one in self.comparisons:
            if one.metric == metric and {one.a, one.b} == {a, b}:
                return one if one.a == a else swapped(one)
        return None

    def shown(self, slug: str, metric: str) -> str:
        """`90.7 % [86.1, 93.8]`."""
        cell = self.cells[slug][metric]
        ci95 = None if cell.ci95 is None else list(cell.ci95)
        text = value_text(metric, cell.value, ci95, unit=True)
        return f"{text} {interval_text(metric, cell.value, ci95)}".rstrip()

    def bytes_of(self, slug: str) -> float:
        """size_bytes of a ranked arm."""
        return self.cells[slug]["size_bytes"].value or 0.0


def swapped(one: Comparison) -> Comparison:
    """The same comparison told from b's side."""
    flip = {"better": "worse", "worse": "better"}.get(one.verdict, one.verdict)
    more: dict[str, Any] = {
        **vars(one),
        "a": one.b,
        "b": one.a,
        "difference": -one.difference,
        "ci95": type(one.ci95)(-one.ci95.high, -one.ci95.low),
        "ci95_adjusted": type(one.ci95)(-one.ci95_adjusted.high, -one.ci95_adjusted.low),
        "verdict": flip,
    }
    return Comparison(**more)


def _difference(one: Comparison) -> str:
    return difference_text(one.metric, one.difference, list(one.ci95_adjusted))


def _sentence(one: Comparison) -> str:
    """`task score +1.2 [-0.3, +2.7] points: no difference shown`."""
    return f"{_NOUN[one.metric]} {_difference(one)}: {one.verdict}"


def answers(found: Findings) -> tuple[Answer, ...]:
    """The questions in the order of the families; those for controls and external models only where there are any."""
    question = {family.name: family.question for family in FAMILIES}
    controlled = any(arm.is_control for arm in found.arms.values())
    return (
        _fine_tuning(found, question["fine-tuning"]),
        _merge(found, question["merge"]),
        _scheme(found, question["schemes"]),
        _merge_first(found, question["merge-first"]),
        *([_calibration(found, question["calibration"])] if controlled else []),
        *([_external(found, question["external"])] if any(arm.external for arm in found.arms.values()) else []),
    )


def _cannot(question: str, why: str) -> Answer:
    text = f"This run cannot say: {why}."
    return Answer(question=question, short=text, text=(text,), known=False)


def _fine_tuning(found: Findings, question: str) -> Answer:
    main = found.pair(REFERENCE, "base", "task") or found.pair(REFERENCE, "base", "ppl_test")
    if main is None:
        return _cannot(question, "base or nf4-adapter has no scores")
    metric, noun = main.metric, _NOUN[main.metric]
    if main.verdict == "no difference shown":
        short = f"{UNKNOWN}: fine-tuning moved the {noun} by {_difference(main)}."
    else:
        way = "lifted" if main.difference > 0 else "lowered"
        before, after = (value_text(metric, found.cells[slug][metric].value, unit=True) for slug in ("base", REFERENCE))
        short = f"Fine-tuning {way} the {noun} from {before} to {after}: {_difference(main)}."
    text = []
    if metric == "task":
        text.append(f"base answers {found.shown('base', 'task')}, nf4-adapter {found.shown(REFERENCE, 'task')}.")
    text.append(f"nf4-adapter against base: {_sentence(main)}.")
    for metric, where in (("ppl_test", "On completions"), ("ppl_general", "On text outside the domain (forgetting)")):
        if one := found.pair(REFERENCE, "base", metric):
            text.append(
                f"{where}: perplexity {found.shown('base', metric)} before, {found.shown(REFERENCE, metric)} after, "
                f"{_difference(one)}: {one.verdict}."
            )
    return Answer(question=question, short=short, text=tuple(text))


def _merge(found: Findings, question: str) -> Answer:
    between = found.pair("merged-dequantized", "merged-original", "kl_mean")
    text = _decided(found)
    named = len(text)
    for slug in ("merged-dequantized", "merged-original"):
        parts = [_sentence(one) for metric in ("task", "ppl_test") if (one := found.pair(slug, REFERENCE, metric))]
        if slug in found.ranked:
            told = "; ".join([f"KL {found.shown(slug, 'kl_mean')} to {found.judge}", *parts])
            text.append(f"{slug}: {told}.")
    if between is None:
        return (
            _cannot(question, "one of the merged models has no scores")
            if len(text) == named
            else Answer(question=question, short=text[named], text=tuple(text))
        )
    text.append(f"merged-dequantized against merged-original: {_sentence(between)}.")
    text += _beside(found)
    short = {
        "better": f"Merging into the dequantized base stays closer to {found.judge} (KL {_difference(between)}).",
        "worse": f"Merging into the original base stays closer to {found.judge} (KL {_difference(between)}).",
    }.get(between.verdict, f"{UNKNOWN} between the two merge bases (KL {_difference(between)}).")
    return Answer(question=question, short=short, text=tuple(text))


def _decided(found: Findings) -> list[str]:
    """Which merge the schemes quantize, and who said so: the recipe, or these figures on dev."""
    choice = found.choice
    if choice is None:
        return []
    if "rule" not in choice:
        return [f"The schemes quantize merged-{choice['candidate']}: the recipe names it (merge.base)."]
    losses, ci95 = choice["loss"], choice["ci95"]
    if ci95 is None:
        told = "of one group only, so nothing can be told"
    else:
        places = decimals((ci95[1] - ci95[0]) / 2)
        told = " against ".join(f"{losses[base]:.{places}f} ({base})" for base in ("dequantized", "original"))
        told += f", difference {difference_text('kl_mean', choice['difference'], ci95)} a token"
    return [
        f"The schemes quantize merged-{choice['candidate']}, chosen by this run (merge.base: auto): loss on dev "
        f"{told}; {choice['tokens']:,} tokens of {choice['rows']:,} rows in {choice['groups']:,} groups. "
        f"Rule: {choice['rule']}."
    ]


def _beside(found: Findings) -> list[str]:
    """What is shown beside the choice and decides nothing."""
    text: list[str] = []
    if ratio := found.error_over_delta:
        kinds = ", ".join(f"{kind} {significant(one['median'], 2)}" for kind, one in ratio["by_kind"].items())
        text.append(
            f"What NF4 changed in a weight against what the adapter changes, ||W − NF4(W)|| / ||delta||: median "
            f"{significant(ratio['median'], 2)} of {ratio['modules']} modules, largest {significant(ratio['max'], 2)} "
            f"({ratio['max_module']}); medians by kind: {kinds}. It decides nothing."
        )
    if found.adapter and found.reference == REFERENCE:
        text.append(
            f"The adapter was trained elsewhere; the weights under it there: {found.adapter['provenance']}. KL is "
            "measured against it on NF4 weights: where it was trained on others, KL favours the dequantized base."
        )
    return text


def _schemes(found: Findings) -> list[str]:
    """Ranked schemes on the merged model, smallest KL first."""
    merged = [
        slug
        for slug in found.ranked
        if (arm := found.arms[slug]).scheme and not arm.on_base and not arm.is_control and arm.kv is None
    ]
    return sorted(merged, key=lambda slug: (found.cells[slug]["kl_mean"].value or 0.0, slug))


def _beaten(slug: str, rivals: Sequence[str], found: Findings) -> str | None:
    """A rival of no more bytes whose KL is shown to be lower."""
    for rival in rivals:
        one = found.pair(rival, slug, "kl_mean")
        if one and one.verdict == "better" and found.bytes_of(rival) <= found.bytes_of(slug) * 1.001:
            return rival
    return None


def _scheme(found: Findings, question: str) -> Answer:
    schemes = _schemes(found)
    if not schemes:
        return _cannot(question, "no scheme on the merged model has all its figures")
    beaten = {slug: rival for slug in schemes if (rival := _beaten(slug, schemes, found))}
    front = [slug for slug in schemes if slug not in beaten]
    best = front[0]
    merged = f"merged-{found.arms[best].merge_base}"
    share = found.bytes_of(best) / found.bytes_of(merged) if merged in found.ranked else None
    of_merge = f", {share:.0%} of {merged}".replace("%", " %") if share else ""
    text = [f"{best} loses least: KL {found.shown(best, 'kl_mean')}, {size(found.bytes_of(best))}{of_merge}."]
    cost = found.pair(best, merged, "task")
    if cost:
        text.append(f"Against {merged}: {_sentence(cost)}.")
    text += [_smaller(slug, best, found) for slug in front[1:]]
    if beaten:
        lost = ", ".join(f"{slug} (by {rival})" for slug, rival in beaten.items())
        text.append(f"Beaten on KL by a scheme of no more bytes: {lost}.")
    equal = [
        slug for slug in front[1:] if _no_difference(slug, best, found) and found.bytes_of(slug) < found.bytes_of(best)
    ]
    keeps = f"{best} keeps most: {size(found.bytes_of(best))}{of_merge}, KL {found.shown(best, 'kl_mean')}"
    costs = f", task score {_difference(cost)} against it ({cost.verdict})" if cost else ""
    beside = f"; {equal[0]} is smaller and not shown to be worse" if equal else ""
    return Answer(question=question, short=f"{keeps}{costs}{beside}.", text=tuple(text))


def _no_difference(a: str, b: str, found: Findings) -> bool:
    one = found.pair(a, b, "kl_mean")
    return one is not None and one.verdict == "no difference shown"


def _smaller(slug: str, best: str, found: Findings) -> str:
    """What another scheme on the front saves and costs against the best one."""
    saved = 1 - found.bytes_of(slug) / found.bytes_of(best)
    if abs(saved) < 0.0005:
        bytes_ = "as large"
    else:
        bytes_ = f"{significant(abs(saved) * 100, 2)} % {'smaller' if saved > 0 else 'larger'}"
    parts = [_sentence(one) for metric in ("kl_mean", "task") if (one := found.pair(slug, best, metric))]
    return f"{slug} is {bytes_}, KL {found.shown(slug, 'kl_mean')}; against {best}: {'; '.join(parts)}."


def _merge_first(found: Findings, question: str) -> Answer:
    pairs = [(slug, f"{slug}.on-base") for slug in _schemes(found) if found.pair(slug, f"{slug}.on-base", "kl_mean")]
    if not pairs:
        return _cannot(question, "no scheme was scored both ways")
    text: list[str] = []
    words: dict[str, list[str]] = {}
    for merged, on_base in pairs:
        made = [one for metric in ("kl_mean", "task") if (one := found.pair(merged, on_base, metric))]
        words.setdefault(made[0].verdict, []).append(f"{_difference(made[0])} for {merged}")
        parts = [_sentence(one) for one in made]
        if on_base in found.ranked:
            parts.append(f"{size(found.bytes_of(merged))} against {size(found.bytes_of(on_base))}")
        text.append(f"{merged} against {on_base}: {'; '.join(parts)}.")
    short = "; it ".join(
        f"{found.nearer(word)} quantized base + adapter: KL {', '.join(of)}" for word, of in words.items()
    )
    return Answer(question=question, short=f"Merged-then-quantized {short}.", text=tuple(text))


def _calibration(found: Findings, question: str) -> Answer:
    """Every scheme against its controls, KL for the short answer."""
    made = [one for one in found.comparisons if one.family == "calibration"]
    if not made:
        return _cannot(question, "no scheme was scored beside its controls")
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for one in made:
        pairs.setdefault((one.a, one.b), []).append(one)
    text = [f"{a} against {b}: {'; '.join(map(_sentence, both))}." for (a, b), both in pairs.items()]
    words: dict[str, list[str]] = {}
    for one in (one for one in made if one.metric == "kl_mean"):
        words.setdefault(one.verdict, []).append(f"{_control(found.arms[one.b])} for {one.a} (KL {_difference(one)})")
    short = "; it ".join(f"{found.nearer(word)} {', '.join(which)}" for word, which in words.items())
    return Answer(question=question, short=f"Calibration on the domain {short}.", text=tuple(text))


def _external(found: Findings, question: str) -> Answer:
    """Every external model against ours; task score and bits a byte for the short answer."""
    made = [one for one in found.comparisons if one.family == "external"]
    if not made:
        return _cannot(question, "no external model was scored on the same rows as one of ours")
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for one in made:
        pairs.setdefault((one.a, one.b), []).append(one)
    text: list[str] = []
    short: list[str] = []
    for (a, b), every in pairs.items():
        sizes = [known for slug in (a, b) if (known := found.cells[slug]["size_bytes"].value) is not None]
        parts = [*map(_sentence, every), *([f"{size(sizes[0])} against {size(sizes[1])}"] if len(sizes) == 2 else [])]
        text.append(f"{a} against {b}: {'; '.join(parts)}.")
        short.append(f"{a} against {b}: {'; '.join(map(_sentence, every[:2]))}")
        reason = found.cells[a]["ppl_test"].reason
        if reason and found.cells[a]["ppl_test"].value is None:
            text.append(f"{a} has no perplexity and no KL: {reason}.")
    return Answer(question=question, short=f"{'; '.join(short)}.", text=tuple(text))


def _control(arm: RunArm) -> str:
    """What a scheme was calibrated on instead."""
    if arm.scales_from_base:
        return "scales found on the base"
    if arm.is_control:
        return {"generic": "general text", "mixed": "half general text", "random": "random tokens"}[arm.calibration]
    return "no calibration"
