"""`python -m tests.bench.served_run`: what an engine served of the latest run, docs/results/served-run-ENGINE.md.

Make the run first, here that of the quickstart, whose other steps are hits where they were made before:

    make quickstart env-onnx
    quench run recipes/quickstart/recipe.yaml --set serve.engine=onnxruntime-genai

or some of its arms, with `quench evaluate ... --only ARM ...`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.store.local import find_home
from tests.bench.served_page import LIMIT, WIDTH

PAGES = CHECKOUT / "docs" / "results"
HEADING = "## Served"


def page(run: Path) -> str:
    """The page of a run.

    Raises:
        SystemExit: The run served nothing.
    """
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    if not report["served"] or not report["served"]["arms"]:
        raise SystemExit(f"{run} served nothing. Run it with --set serve.engine=onnxruntime-genai.")
    section = (run / "report.md").read_text(encoding="utf-8").split(f"\n{HEADING}\n", 1)[1].split("\n## ", 1)[0]
    paragraphs = [*_what(report), "", *_far(report), "", *_seconds(report), "", *_where(report)]
    written = "<!-- Written by `python -m tests.bench.served_run`. -->"
    return "\n".join([written, "# A run, served", "", *paragraphs, "", "## The report's section", section])


def _what(report: Mapping[str, Any]) -> Iterator[str]:
    told = next(iter(report["served"]["arms"].values()))
    only = f"--only {' '.join(report['only'])} " if report["only"] else ""
    which = "of these arms those" if only else "every merged and every quantized arm"
    yield from _wrapped(
        f"`quench {'evaluate' if only else 'run'} recipes/{report['name']}/recipe.yaml {only}--set "
        f"serve.engine={told['engine']}`: {which} that the engine reads, served by {told['engine']} {told['version']} "
        "over HTTP, and asked for the losses and the answers of the same rows of test."
    )


def _far(report: Mapping[str, Any]) -> Iterator[str]:
    arms = report["served"]["arms"]
    apart = {slug: told["differences"]["served_loss"]["difference"] for slug, told in arms.items()}
    slug = max(apart, key=lambda slug: abs(apart[slug]))
    kept = sum(abs(value) <= LIMIT for value in apart.values())
    yield from _wrapped(
        f"**The loss of {kept} of {len(apart)} arms is the report's to within {LIMIT:g} nats a token**; {slug} is "
        f'furthest apart, by {apart[slug]:+.6f}. Verdict "served as measured": '
        f"{sum(told['verdict'] == 'served as measured' for told in arms.values())} of {len(arms)}."
    )


def _seconds(report: Mapping[str, Any]) -> Iterator[str]:
    served = report["seconds"]["serve"]
    rest = sum(report["seconds"].values()) - served
    yield from _wrapped(
        f"Seconds of all children: {rest:,.0f} without serving, {served:,.0f} more with it ({served / rest:.0%}); two "
        "children at once but for `measure` and `serve`, which have the machine for themselves."
    )


def _where(report: Mapping[str, Any]) -> Iterator[str]:
    machine, versions = report["hardware"], ", ".join(f"{name} {text}" for name, text in report["versions"].items())
    rows = next(iter(report["served"]["arms"].values()))["differences"]["served_loss"]["n"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    place = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {gpus}"
    yield from _wrapped(
        f"{rows:,} rows of test, seeds as in the recipe; {place}, other work beside: read seconds as ratios; "
        f"{versions}."
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=WIDTH, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    latest = find_home() / "runs" / "latest"
    written = page(latest)
    engine = next(iter(json.loads((latest / "report.json").read_text(encoding="utf-8"))["served"]["arms"].values()))
    path = PAGES / f"served-run-{engine['engine']}.md"
    path.write_text(written, encoding="utf-8")
    print(path)
