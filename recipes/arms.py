"""The evaluation matrix, spelled out: every way the fine-tune could be shipped, under a readable slug."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from recipes.nulls import Machine, Null, null_arms
from recipes.problem import Problem, RecipeError
from recipes.schema import Recipe
from recipes.schemes.schema import LayerRule, SchemeSpec
from recipes.schemes.scheme import PER_CHANNEL, Grid, Rule, Scheme
from recipes.schemes.slugs import by_backend, parse_scheme

Kind = Literal["bf16", "nf4", "quantized", "external"]
KV = Literal["fp8", "fp8-calibrated", "int8"]
MergeBase = Literal["dequantized", "original", "auto"]
Calibration = Literal["domain", "generic", "mixed", "random"]
TRAINED = "nf4-adapter"  # the model as it was trained
FLOOR = "merged-dequantized"  # bf16 in every engine, so that what two of them differ by there is arithmetic alone
EXTERNAL = "external"  # --only external: every external model
CHAMPION = "champion"  # what is in production, as the gate and its scores name it
CONTROLS: tuple[Calibration, ...] = ("generic", "mixed", "random")
KV_CACHES: tuple[KV, ...] = ("fp8", "fp8-calibrated", "int8")
NOT_DECODED = "not decoded: nothing chooses by it"  # answers to dev of arms that cannot be promoted
ONE_CORE = Machine()  # the smallest machine, where nobody says which it is
NO_DORA = {"gptq": "GPTQLoraLinear", "awq": "AwqLoraLinear"}  # format -> PEFT 0.21.2's layer, which raises


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to ship, and what is loaded for it.

    Attributes:
        slug: Its name everywhere.
        kind: How the model folder is loaded.
        merge_base: The weights that the adapter was merged into; `auto` where the run decides, None where nothing is
            merged.
        scheme: How it is quantized; None where nothing is but the base, to NF4.
        on_base: The scheme is applied to the base, and the adapter stays on top.
        adapter: The adapter is loaded on top.
        calibration: The calibration set; `domain` is the run's own, the others are controls.
        scales_from_base: AWQ's scales and clipping are those that it finds on the base.
        kv: How its KV cache is stored (simulated); None for bf16.
        null: What is other about its computing: same files, so its differences are noise of arithmetic.
        of: Slug of the arm whose files it loads, where it differs from that arm in its KV cache or its computing alone.
        external: A model that this pipeline did not make, loaded as its config.json says.
        unavailable: Why this arm cannot be, known before the run; None where it can.
    """

    slug: str
    kind: Kind
    merge_base: MergeBase | None = None
    scheme: Scheme | None = None
    on_base: bool = False
    adapter: bool = False
    calibration: Calibration = "domain"
    scales_from_base: bool = False
    kv: KV | None = None
    null: Null | None = None
    of: str | None = None
    external: bool = False
    unavailable: str | None = None

    @property
    def is_trained(self) -> bool:
        """Holds what was trained: on top, or merged in."""
        return self.adapter or self.merge_base is not None

    @property
    def is_control(self) -> bool:
        """Made to be compared with, not to be shipped."""
        return self.calibration != "domain" or self.scales_from_base

    @property
    def may_be_promoted(self) -> bool:
        """One artifact, made by this run to be shipped. What chooses among arms by their answers to dev reads these."""
        return self.merge_base is not None and self.of is None and not self.is_control


def arms(recipe: Recipe, *, adapter: Mapping[str, Any] | None = None, machine: Machine = ONE_CORE) -> tuple[Arm, ...]:
    """All arms in the order of the report.

    Args:
        recipe: The recipe.
        adapter: adapter_config.json of `train.adapter`, where that stands in the place of training.
        machine: Where they are evaluated; null arms depend on it.

    Raises:
        RecipeError: A slug names no scheme; two specs have one name; a control of no scheme of the recipe; a KV cache
            of no arm; an external model with the name of another arm.
    """
    schemes = [specified(entry) for entry in recipe.quantize.schemes]
    on_base = [parse_scheme(slug) for slug in recipe.evaluate.on_base]
    problems = [*_repeated(schemes, field="quantize.schemes"), *_repeated(on_base, field="evaluate.on_base")]
    problems += _uncontrolled(recipe.calibrate.controls, schemes)
    if problems:
        raise RecipeError(problems)
    controlled = [scheme for scheme in schemes if scheme.slug in recipe.calibrate.controls]
    schemes += _rounded(controlled, schemes)
    dora = recipe.train.dora if adapter is None else bool(adapter.get("use_dora"))
    plain = (
        Arm(slug="base", kind="bf16"),
        Arm(slug="base-nf4", kind="nf4"),
        Arm(slug=TRAINED, kind="nf4", adapter=True),
        Arm(slug=FLOOR, kind="bf16", merge_base="dequantized"),
        Arm(slug="merged-original", kind="bf16", merge_base="original"),
        *(_quantized(scheme, recipe.merge.base) for scheme in schemes),
        *(arm for scheme in controlled for arm in _controls(scheme, recipe.merge.base)),
        *(_on_base(scheme, dora=dora) for scheme in on_base),
    )
    by_slug = {arm.slug: arm for arm in plain}
    if problems := [*_no_arms(recipe.evaluate.kv_cache, plain), *_taken(recipe.evaluate.external, by_slug)]:
        raise RecipeError(problems)
    named = () if recipe.serve.arms == "default" else recipe.serve.arms
    every = (
        *plain,
        *(arm for slug in recipe.evaluate.kv_cache for arm in _kv_caches(by_slug[slug])),
        *(Arm(slug=name, kind="external", external=True) for name in recipe.evaluate.external),
    )
    if problems := list(_not_servable(named, every)):
        raise RecipeError(problems)
    return (*every, *_nulls(recipe, by_slug[FLOOR], every, machine))


def _nulls(recipe: Recipe, floor: Arm, every: Sequence[Arm], machine: Machine) -> Iterator[Arm]:
    others = sum(arm.unavailable is None for arm in every)
    for null in null_arms(recipe, others=others, machine=machine):
        slug = f"{floor.slug}.null-{null.kind}"
        yield replace(floor, slug=slug, null=null.kind, of=floor.slug, unavailable=null.unavailable)


def _not_servable(named: Sequence[str], every: Sequence[Arm]) -> Iterator[Problem]:
    """Entries of serve.arms that name no arm with files of its own."""
    able = [arm.slug for arm in every if arm.merge_base is not None and arm.of is None]
    for index, slug in enumerate(named):
        if slug not in able:
            known = slug in {arm.slug for arm in every}
            yield Problem(
                what=f"{slug} cannot be served as it is." if known else f"The matrix has no arm {slug}.",
                where=f"serve.arms.{index}",
                why="A server starts on the files of one arm: a merged model, quantized or not.",
                next=f"Write some of {', '.join(able)}, or `default`.",
            )


def _taken(names: Iterable[str], slugs: Collection[str]) -> Iterator[Problem]:
    """External models with the name of another arm, the word for all of them, or the one that `quench promote` uses."""
    reserved = {
        EXTERNAL: "`--only external` means all external models.",
        CHAMPION: "`quench promote` calls the promoted model so.",
    }
    for name in names:
        if name in reserved or name in slugs:
            yield Problem(
                what=f"An external model cannot be called {name}.",
                where=f"evaluate.external.{name}",
                why=reserved.get(name, "Another arm has this name."),
                next="Give it a name of its own, for example production.",
            )


def controls(every: Sequence[Arm]) -> list[Calibration]:
    """The control sets that these arms are calibrated on."""
    calibrations = {arm.calibration for arm in every}
    return [kind for kind in CONTROLS if kind in calibrations]


def _quantized(scheme: Scheme, merge_base: MergeBase) -> Arm:
    return Arm(slug=scheme.slug, kind="quantized", merge_base=merge_base, scheme=scheme)


def _on_base(scheme: Scheme, *, dora: bool) -> Arm:
    layer = NO_DORA.get(scheme.form) if dora else None
    return Arm(
        slug=f"{scheme.slug}.on-base",
        kind="quantized",
        scheme=scheme,
        on_base=True,
        adapter=True,
        unavailable=f"PEFT puts no DoRA on {scheme.form} layers: {layer} does not support DoRA yet" if layer else None,
    )


def _kv_caches(arm: Arm) -> Iterator[Arm]:
    for kv in KV_CACHES:
        yield replace(arm, slug=f"{arm.slug}.kv-{kv}", kv=kv, of=arm.slug)


def _no_arms(slugs: Sequence[str], every: Sequence[Arm]) -> Iterator[Problem]:
    """Entries of evaluate.kv_cache that name no arm, or one twice."""
    stored = [arm.slug for arm in every if arm.scheme and arm.scheme.kv_scales]
    able = [arm.slug for arm in every if arm.slug not in stored]
    for index, slug in enumerate(slugs):
        if slug not in able or slug in slugs[:index]:
            what = f"{slug} stands twice." if slug in slugs[:index] else f"The matrix has no arm {slug}."
            yield Problem(
                what=f"{slug} has KV scales of its own, which enter its figures." if slug in stored else what,
                where=f"evaluate.kv_cache.{index}",
                why="Each entry is an arm of this recipe, which is evaluated again with its KV cache quantized.",
                next=f"Write one of {', '.join(arm for arm in able if arm not in slugs)}.",
            )


def _controls(scheme: Scheme, merge_base: MergeBase) -> Iterator[Arm]:
    plain = _quantized(scheme, merge_base)
    for calibration in CONTROLS:
        yield replace(plain, slug=f"{scheme.slug}.calib-{calibration}", calibration=calibration)
    if scheme.method == "awq" and scheme.backend == "gptqmodel":
        yield replace(plain, slug=f"{scheme.slug}.scales-from-base", scales_from_base=True)


def _rounded(controlled: Sequence[Scheme], schemes: Sequence[Scheme]) -> list[Scheme]:
    """Rounding to nearest with the bits and groups of these schemes, where the recipe does not have it."""
    rounded = {(scheme.bits, scheme.group_size) for scheme in schemes if scheme.method == "rtn"}
    wanted = dict.fromkeys((scheme.bits, scheme.group_size) for scheme in controlled)
    return [
        parse_scheme(f"rtn-w{bits}" if group == PER_CHANNEL else f"rtn-w{bits}-g{group}")
        for bits, group in wanted
        if (bits, group) not in rounded
    ]


def _uncontrolled(slugs: Sequence[str], schemes: Sequence[Scheme]) -> Iterator[Problem]:
    able = [scheme.slug for scheme in schemes if scheme.needs_calibration]
    for index, slug in enumerate(slugs):
        if slug not in able or slug in slugs[:index]:
            yield Problem(
                what=f"{slug} stands twice." if slug in slugs[:index] else f"{slug} has no calibration to control.",
                where=f"calibrate.controls.{index}",
                why="A control is compared with a scheme of quantize.schemes that reads a calibration set.",
                next=f"Write one of {', '.join(able)}." if able else "Remove it, or add such a scheme.",
            )


def specified(entry: str | SchemeSpec) -> Scheme:
    """The scheme of an entry of quantize.schemes, under the name of its arm.

    Raises:
        RecipeError: No such scheme; a backend, rules or KV scales that it cannot have.
    """
    if isinstance(entry, str):
        return parse_scheme(entry)
    scheme = parse_scheme(entry.scheme)
    if entry.backend is not None:
        scheme = by_backend(scheme, entry.backend)
    if (entry.rules or entry.kv_scales) and scheme.form != "compressed-tensors":
        raise Problem(
            what=f"{entry.scheme} cannot have {'rules' if entry.rules else 'kv_scales'}.",
            where=entry.scheme,
            why="Files of other formats with mixed grids or KV scales load in no server.",
            next="Write a ct- scheme, for example ct-gptq-w4-g128.",
        ).error()
    own = tuple(_rule(rule, scheme) for rule in entry.rules)
    return replace(scheme, slug=entry.name or scheme.slug, rules=(*own, *scheme.rules), kv_scales=entry.kv_scales)


def _rule(rule: LayerRule, scheme: Scheme) -> Rule:
    if rule.keep:
        return Rule(rule.match, None)
    grid = scheme.grid
    return Rule(rule.match, Grid(rule.bits or grid.bits, rule.group_size or grid.group_size, grid.symmetric))


def _repeated(schemes: list[Scheme], *, field: str) -> list[Problem]:
    slugs = [scheme.slug for scheme in schemes]
    first = {slug: index for index, slug in reversed(list(enumerate(slugs)))}
    return [
        Problem(
            what=f"The scheme {slug} stands twice in {field}.",
            where=f"{field}.{index}",
            why=f"Two arms would have one name; the first is {field}.{first[slug]}.",
            next="Remove one of the two.",
        )
        for index, slug in enumerate(slugs)
        if first[slug] != index
    ]
