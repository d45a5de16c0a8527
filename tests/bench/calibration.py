"""`make bench`: does it matter what a scheme is calibrated on? Writes docs/results/calibration.md.

The quickstart's merged model, quantized by awq-w4-g128 and gptq-w3-g128 after calibration on the domain (stratified
random rows: what Quench does), on other text, and on domain rows that cover its activations: k-means over mean hidden
states. Each is drawn with several seeds; arms are compared by KL to the model as it was trained, pairwise over the
test rows. Given a folder, an interrupted benchmark goes on there: `python -m tests.bench.calibration FOLDER`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from flows.compose import compose
from flows.pins import pin
from flows.plan.lookup import known_inputs
from flows.results.draws import draw
from flows.results.metrics import difference_text, interval_text, value_text
from flows.results.rows import RowScores, read_scores
from flows.results.stats import Estimand, difference_intervals, mean_interval, studentized
from recipes.checks.check import load_and_check
from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT, Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.step import Context, Limits, Step, hardware, run_step
from tasks.runtime.store.local import Artifact, Store
from tests.jobs.build import make_job

RESULTS = CHECKOUT / "docs" / "results" / "calibration.md"
RECIPE = CHECKOUT / "recipes" / "quickstart" / "recipe.yaml"
SCHEMES = {"awq-w4-g128": "rtn-w4-g128", "gptq-w3-g128": "rtn-w3-g128"}  # and what needs no calibration
SEEDS = (0, 1, 2)
KINDS = {
    "domain": "train rows, stratified random: what Quench does",
    "kmeans": "train rows nearest to the centres of k-means over mean hidden states",
    "mixed": "half domain, half generic",
    "generic": "docstrings (general_calibration.jsonl)",
    "random": "random token ids",
    "scales-from-base": "domain, but scales and clipping found on the base (AWQ)",
    "none": "rounding to nearest",
}
SETS = [
    "measure.enabled=false",
    "merge.base=dequantized",
    f"quantize.schemes=[{', '.join(SCHEMES)}]",
    f"calibrate.controls=[{', '.join(SCHEMES)}]",
    "calibrate.general=data/general_calibration.jsonl",
    "evaluate.on_base=[]",
    "evaluate.kv_cache=[]",
]


class Made(NamedTuple):
    """What all arms share: artifacts by step key, and the calibration sets of every seed by kind."""

    artifacts: dict[str, Path]
    calibsets: dict[tuple[str, int], Path]


def prepared(home: Path) -> Made:
    """Train, merge, store the reference and draw the calibration sets of all seeds, as a run does."""
    artifacts: dict[str, Artifact] = {}
    calibsets: dict[tuple[str, int], Path] = {}
    with Launcher() as launcher:
        context = Context(store=Store(home), launcher=launcher, leases=Leases(home), limits=Limits(threads=1))

        def do(step: Step) -> None:
            if step.stage in ("prepare", "train", "merge", "reference", "calibrate"):
                inputs = known_inputs(step, artifacts)
                assert inputs is not None
                artifacts[step.key] = run_step(step, inputs, context).artifact
                print(step.key, flush=True)

        for seed in SEEDS:
            loaded = load_and_check(RECIPE, sets=[*_placed(SETS), f"calibrate.seed={seed}"])
            compose(loaded.recipe, pin(loaded, home), do)
            for kind in ("domain", "generic", "mixed", "random"):
                key = "calibrate/quickstart" + ("" if kind == "domain" else f"-{kind}")
                calibsets[kind, seed] = artifacts[key].path
    paths = {key: one.path for key, one in artifacts.items()} | {"base": RECIPE.parent / "base"}
    for seed in SEEDS:
        calibsets["kmeans", seed] = covering(home / "bench" / f"kmeans-{seed}", paths, calibsets, seed)
    return Made(paths, calibsets)


def _placed(sets: list[str]) -> list[str]:
    """A path given by --set counts from the current folder."""
    return [one.replace("=data/", f"={RECIPE.parent}/data/") for one in sets]


def covering(out: Path, paths: dict[str, Path], calibsets: dict[tuple[str, int], Path], seed: int) -> Path:
    """As many train rows as the domain set has, each nearest to a centre of k-means, packed the same way."""
    if (out / "calibset.parquet").exists():
        return out
    import torch
    from sklearn.cluster import KMeans

    from tasks.jobs.calibrate import DrawableRow, Packed, pack, write_calibset
    from tasks.jobs.loading.load import load_bf16
    from tasks.jobs.text.leaks import without_near_duplicates

    params = json.loads((calibsets["domain", seed].parent / "manifest.json").read_text())["identity"]["params"]
    columns = ["row", "split", "domain", "messages", "input_ids"]
    every = pq.read_table(paths["prepare/quickstart"] / "rows.parquet", columns=columns).to_pylist()
    train = {
        one["row"]: DrawableRow(one["row"], one["domain"], one["messages"], one["input_ids"])
        for one in every
        if one["split"] == "train"
    }
    rows = [train[name] for name in without_near_duplicates({name: one.turns for name, one in train.items()})]
    torch.set_num_threads(1)
    model = load_bf16(paths["merge/quickstart-dequantized"], device="cpu")
    means = np.empty((len(rows), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for number, row in enumerate(rows):
            hidden = model.model(torch.tensor([row.input_ids])).last_hidden_state
            means[number] = hidden[0].float().mean(0).numpy()
    found = KMeans(params["rows"], n_init=1, random_state=seed).fit(means)
    chosen: list[DrawableRow] = []
    for number in range(params["rows"]):
        inside = np.flatnonzero(found.labels_ == number)
        distances = ((means[inside] - found.cluster_centers_[number]) ** 2).sum(1)
        chosen.append(rows[inside[distances.argmin()]])
    out.mkdir(parents=True, exist_ok=True)
    packed = pack(chosen, seq_len=params["seq_len"])
    write_calibset(
        out, [Packed([one.row for one in some], [i for one in some for i in one.input_ids]) for some in packed]
    )
    return out


def scored(home: Path, made: Made, scheme: str, kind: str, seed: int) -> RowScores:
    """KL of one arm on the test rows; quantized and scored in this process where it was not before."""
    out = home / "bench" / f"{scheme}-{kind}-{seed}"
    if not (out / "done").exists():
        shutil.rmtree(out, ignore_errors=True)
        _make_arm(out, made, scheme, kind, seed)
        (out / "done").touch()
        print(out.name, flush=True)
    return read_scores(out / "scores")["kl"]


def _make_arm(out: Path, made: Made, scheme: str, kind: str, seed: int) -> None:
    from recipes.schemes.slugs import parse_scheme
    from tasks.jobs import evaluate, quantize

    slug = SCHEMES[scheme] if kind == "none" else scheme
    params: dict[str, Any] = parse_scheme(slug).params() | {"seed": 0, "damp": 0.05}
    inputs = {"model": made.artifacts["merge/quickstart-dequantized"]}
    if kind != "none":
        inputs["calibset"] = made.calibsets["domain" if kind == "scales-from-base" else kind, seed]
    if kind == "scales-from-base":
        inputs["scales_from"] = made.artifacts["base"]
    quantize.run(make_job("quantize", out / "model", params=params, **inputs))
    asked = {
        "kind": "quantized",
        "scorers": [{"kind": "exact-match", "name": "exact-match"}],
        "max_new_tokens": 1,
        "batch_size": 50,
        "seed": 0,
    }
    common = {"dataset": made.artifacts["prepare/quickstart"], "reference": made.artifacts["reference/quickstart"]}
    evaluate.run(make_job("evaluate", out / "scores", params=asked, model=out / "model", **common))
    shutil.rmtree(out / "model")


class Line(NamedTuple):
    """An arm of the page: KL averaged over seeds a row, and of each seed."""

    kind: str
    mean: RowScores
    seeds: list[float]


def lines(home: Path, made: Made, scheme: str) -> list[Line]:
    """All arms of a scheme."""
    found: list[Line] = []
    for kind in KINDS:
        if kind == "scales-from-base" and not scheme.startswith("awq"):
            continue
        rows = [scored(home, made, scheme, kind, seed) for seed in (SEEDS if kind != "none" else SEEDS[:1])]
        mean = replace(rows[0], total=np.mean([one.total for one in rows], axis=0))
        found.append(Line(kind, mean, [one.sums.value for one in rows]))
    return found


def table(found: list[Line], made: Made) -> Iterator[str]:
    """A row an arm; differences to the domain hold together (max-|t| over the table)."""
    domain, *others = found
    counts = draw(len(domain.mean.groups))
    alone = studentized([Estimand(one.mean.sums) for one in found], counts)
    pairs = studentized([Estimand(one.mean.sums, domain.mean.sums) for one in others], counts)
    adjusted = dict(
        zip((one.kind for one in others), zip(pairs, difference_intervals(pairs), strict=True), strict=True)
    )
    yield "| calibration | tokens | KL, nats | by seed | against domain | seeds above domain |"
    yield "| --- | ---: | --- | --- | --- | ---: |"
    for one, own in zip(found, alone, strict=True):
        interval = list(mean_interval(own))
        told, above = "", ""
        if one.kind in adjusted:
            pair, ends = adjusted[one.kind]
            word = "no difference shown" if ends.low <= 0 <= ends.high else ("closer" if ends.high < 0 else "further")
            told = f"{difference_text('kl_mean', pair.estimate, list(ends))}: {word}"
            above = f"{sum(a > b for a, b in zip(one.seeds, domain.seeds, strict=False))} of {len(one.seeds)}"
        kl = f"{value_text('kl_mean', own.estimate, interval)} {interval_text('kl_mean', own.estimate, interval)}"
        seeds = ", ".join(f"{value:.5f}" for value in one.seeds)
        yield f"| {one.kind} | {_tokens(made, one.kind)} | {kl} | {seeds} | {told} | {above} |"


def _tokens(made: Made, kind: str) -> str:
    """Least and most tokens of the kind's sets."""
    if kind == "none":
        return ""
    sets = [made.calibsets["domain" if kind == "scales-from-base" else kind, seed] for seed in SEEDS]
    found = [
        sum(map(len, pq.read_table(one / "calibset.parquet", columns=["input_ids"])["input_ids"].to_pylist()))
        for one in sets
    ]
    return f"{min(found):,} - {max(found):,}" if min(found) < max(found) else f"{min(found):,}"


def page(tables: dict[str, list[str]], rows: RowScores) -> str:
    """docs/results/calibration.md."""
    wins = [scheme for scheme, one in tables.items() if any("| kmeans" in row and ": closer" in row for row in one)]
    ruling = (
        f"Rows that cover the activations (kmeans) are shown to be better than stratified random ones for "
        f"{len(wins)} of {len(tables)} schemes. The rule: a recipe option only if for all."
    )
    machine = hardware()
    versions = ", ".join(f"{name} {locked_versions()[name]}" for name in ("torch", "transformers", "gptqmodel"))
    said = "\n".join(f"* `{kind}`: {meaning}" for kind, meaning in KINDS.items())
    shown = "\n\n".join("\n".join([f"## {scheme}", "", *one]) for scheme, one in tables.items())
    return f"""<!-- Written by `make bench` (python -m tests.bench.calibration). -->
# Calibration data, compared

The quickstart's model, merged into the dequantized base, quantized after calibration on

{said}

each drawn with the seeds {", ".join(map(str, SEEDS))}. All sets but kmeans have the shape of the domain set of the
same seed: as many sequences, of the same lengths. KL(nf4-adapter || arm) over the completion tokens of test
({len(rows.rows):,} rows, {len(rows.groups):,} groups, {rows.n:,} tokens), the mean over seeds; 95 % intervals over
groups of rows (studentized bootstrap), those of the differences together over a table. They speak of the test rows;
what the draw of the calibration rows does is in the column by seed. One fine-tune of one small model.

{shown}

{ruling}

{machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gib"]} GiB; {versions}.
"""


def measured(home: Path) -> None:
    """Measure what is missing, write the page."""
    made = prepared(home)
    found = {scheme: lines(home, made, scheme) for scheme in SCHEMES}
    tables = {scheme: list(table(one, made)) for scheme, one in found.items()}
    RESULTS.write_text(page(tables, next(iter(found.values()))[0].mean), encoding="utf-8")
    print(f"wrote {RESULTS}")


def main(folder: Callable[[], contextlib.AbstractContextManager[str]]) -> None:
    """In a given folder, or in one that is thrown away."""
    with folder() as home:
        measured(Path(home).resolve())


if __name__ == "__main__":
    named = sys.argv[1:]
    main((lambda: contextlib.nullcontext(named[0])) if named else tempfile.TemporaryDirectory)
