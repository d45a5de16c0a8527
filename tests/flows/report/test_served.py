"""What people see of the engine: section, mark, table, plot, card, MLflow's figures; nothing of it in other runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from rich.console import Console

from flows.report.build import Report, print_report, render
from flows.report.html import figures, page
from flows.report.model_card import as_served
from flows.report.served import mark_of, served_figures
from flows.report.text import markdown
from flows.results.cells import Draws, gather
from flows.results.read import read_run
from flows.results.served import served_of
from tests.chromium import chromium
from tests.flows.report.test_html import words
from tests.flows.synthetic_run import SHAPES, Serving, SyntheticRun

BROKEN = {
    "what": "vLLM 0.32.0 ended while it started.",
    "where": "serve/gptq-w3-g128",
    "why": "ValueError: 3 bits",
    "next": "serve another arm",
}
SERVING = {
    "merged-dequantized": Serving(speed=0.5),
    "awq-w4-g128": Serving(),
    "gptq-w4-g128": Serving(),
    "gptq-w4-g32": Serving(changed=0.3),
    "rtn-w4-g128": Serving(bias=0.004),
    "gptq-w3-g128": Serving(),
}
AS_MEASURED, DIFFERS = "served as measured", "differs by more than the floor"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def made(home: Path) -> Report:
    run = SyntheticRun(
        home,
        serving=SERVING,
        unserved={"merged-original": "it is not among serve.arms"},
        broken={"serve/gptq-w3-g128": BROKEN},
    )
    return render(run.write(), home)


@pytest.fixture(scope="module")
def report(made: Report) -> dict[str, Any]:
    return dict(made.json)


def test_each_arm_has_its_verdict_and_the_checks_behind_it(report: dict[str, Any]) -> None:
    served = report["served"]
    found = {slug: arm["verdict"] for slug, arm in served["arms"].items()}
    assert found == {
        "merged-dequantized": AS_MEASURED,
        "awq-w4-g128": AS_MEASURED,
        "gptq-w4-g128": AS_MEASURED,
        "gptq-w4-g32": DIFFERS,
        "rtn-w4-g128": DIFFERS,
    }
    assert served["floor"] == {"arm": "merged-dequantized", "reason": None}
    convicted = {
        slug: [check["name"] for check in arm["checks"] if check["outcome"] == "differs"]
        for slug, arm in served["arms"].items()
    }
    assert convicted["gptq-w4-g32"] == ["answers"] and convicted["rtn-w4-g128"] == ["loss", "rows"]
    assert served["not_served"] == {
        "merged-original": "it is not among serve.arms",
        "gptq-w3-g128": "serve/gptq-w3-g128: vLLM 0.32.0 ended while it started (ValueError: 3 bits)",
    }


def test_the_figures_are_those_of_the_engine_beside_the_arms_own(report: dict[str, Any]) -> None:
    arm = report["served"]["arms"]["rtn-w4-g128"]
    loss, apart = arm["metrics"]["served_loss"], arm["differences"]["served_loss"]
    assert loss["n"] == report["data"]["test"]["tokens"] and loss["ci95"][0] < loss["value"] < loss["ci95"][1]
    assert loss["value"] - arm["own"]["served_loss"] == pytest.approx(apart["difference"], abs=1e-12)
    assert apart["difference"] == pytest.approx(0.004, abs=0.0005)
    assert arm["metrics"]["served_answers_equal"]["n"] == report["data"]["test"]["rows"]
    assert [load["requests"] for load in arm["loads"]] == [1, 8, 32]


def test_only_what_is_served_as_measured_has_a_place(report: dict[str, Any]) -> None:
    places = {slug: arm["rank"] for slug, arm in report["served"]["arms"].items()}
    assert places["merged-dequantized"] == 3 and {places["awq-w4-g128"], places["gptq-w4-g128"]} <= {1, 2}
    assert places["gptq-w4-g32"] is None and places["rtn-w4-g128"] is None


def test_a_mark_stands_beside_each_arm(report: dict[str, Any]) -> None:
    marks = {slug: mark_of(slug, report) for slug in report["arms"]}
    assert {slug: mark for slug, mark in marks.items() if mark} == {
        "merged-dequantized": "served ✓",
        "awq-w4-g128": "served ✓",
        "gptq-w4-g128": "served ✓",
        "gptq-w4-g32": "served ▼",
        "rtn-w4-g128": "served ▼",
        "gptq-w3-g128": "not served",
    }


def test_markdown_page_and_terminal_say_the_same(report: dict[str, Any]) -> None:
    text, html = markdown(report), words(page(report, {}))
    console = Console(width=160)
    with console.capture() as captured:
        print_report(report, console)
    terminal = " ".join(captured.get().split())
    for told in ("Fastest at 32 requests", "Not served: merged-original: it is not among serve.arms."):
        assert told in text and told in html and told in terminal, told
    assert "| gptq-w4-g128 (served ✓) " in text and "gptq-w4-g128 served ✓" in html
    assert "▼ differs by more than the floor" in text and "▼ differs by more than the floor" in html
    assert "rtn-w4-g128: loss +0.00" in text and "rtn-w4-g128: differs by more than the floor" in terminal
    assert "Their arms are ranked nowhere" not in html  # the arm that was not served is ranked
    assert report["arms"]["gptq-w3-g128"]["ranked"]
    failure = next(one for one in report["failures"] if one["step"] == "serve/gptq-w3-g128")
    assert failure["arms"] == ["gptq-w3-g128"]


def test_the_plot_names_every_arm_that_was_timed(report: dict[str, Any]) -> None:
    drawn = figures(report)["throughput"]
    assert all(f">{slug}<" in drawn for slug in report["served"]["arms"])
    assert "requests at once" in drawn


def test_the_card_says_how_it_was_served(made: Report) -> None:
    told = "\n".join(as_served("gptq-w4-g128", made.json))
    assert "Served by vllm 0.32.0 on AMD EPYC 9R14" in told and "gptq-w4-g128: served as measured; loss " in told
    assert "* 32 at once: " in told and list(as_served("base", made.json)) == []


def test_mlflow_gets_one_set_of_names(report: dict[str, Any]) -> None:
    names = {slug: set(served_figures(slug, report)) for slug in report["served"]["arms"]}
    assert len({frozenset(one) for one in names.values()}) == 1
    figures_ = served_figures("awq-w4-g128", report)
    cell = report["served"]["arms"]["awq-w4-g128"]["loads"][2]["output_tokens_per_s"]
    assert figures_["served_output_tokens_per_s.32"] == cell["value"]
    assert {"served_loss", "served_loss.low", "served_loss_minus_own", "served_ttft_s.p95.8"} <= set(figures_)
    assert served_figures("base", report) == {}


# ---- runs without an engine


def test_a_run_that_served_nothing_has_no_such_section(tmp_path: Path) -> None:
    report = render(SyntheticRun(tmp_path, test=120).write(), tmp_path).json
    assert "served" not in report and "served" not in report["gate"]
    assert "Served" not in markdown(report) and 'id="served"' not in page(report, {})


def test_where_no_engine_is_installed_the_report_says_so_once(tmp_path: Path) -> None:
    why = "the environment .envs/vllm is missing: run make env-vllm"
    slugs = ("merged-dequantized", "awq-w4-g128", "gptq-w4-g128")
    folder = SyntheticRun(tmp_path, test=120, unserved=dict.fromkeys(slugs, why)).write()
    report = dict[str, Any](render(folder, tmp_path).json)
    assert report["served"]["text"] == [f"Not served here: {', '.join(slugs)}: {why}."]
    assert report["served"]["arms"] == {} and "served" not in report["gate"]
    text, html = markdown(report), words(page(report, {}))
    assert f"Not served here: {', '.join(slugs)}: {why}." in text and why in html and "Speed of the engine" not in html
    assert all(mark_of(slug, report) == "" for slug in slugs)


def test_an_engine_that_never_answered_leaves_a_report(tmp_path: Path) -> None:
    """Every serve step failed: no floor, no verdict, the reasons stand."""
    slugs = ("merged-dequantized", "awq-w4-g128")
    run = SyntheticRun(
        tmp_path, test=120, serving=dict.fromkeys(slugs, Serving()), broken={f"serve/{slug}": BROKEN for slug in slugs}
    )
    report = dict[str, Any](render(run.write(), tmp_path).json)
    assert report["served"]["arms"] == {} and set(report["served"]["not_served"]) == set(slugs)
    assert report["served"]["floor"] == {"arm": None, "reason": "merged-dequantized was not served"}


def test_without_prompts_the_losses_decide(tmp_path: Path) -> None:
    serving = {slug: Serving() for slug in ("merged-dequantized", "awq-w4-g128")}
    run = read_run(SyntheticRun(tmp_path, prompts=False, serving=serving).write(), tmp_path)
    served = served_of(run, gather(run), Draws())
    assert served is not None
    arm = served["arms"]["awq-w4-g128"]
    assert arm["verdict"] == AS_MEASURED and {check["name"] for check in arm["checks"]} == {"loss", "rows"}
    assert arm["metrics"]["served_task"]["reason"] == "no row of test has a prompt to answer"


def test_an_arm_of_an_older_run_has_neither_field(tmp_path: Path) -> None:
    arms = read_run(SyntheticRun(tmp_path, test=60, general=0).write(), tmp_path).arms
    assert {(arm.serve, arm.unserved) for arm in arms} == {(None, None)} and len(arms) == len(SHAPES)


# ---- in a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.mark.system
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_section_sticks_out_nowhere(browser: Browser, made: Report, width: int, scheme: Any) -> None:
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown.goto((made.folder / "report.html").as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert (
        shown.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg, .sr')"
            " && e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
        )
        == []
    )
    drawn = "figure svg[aria-label^='Decoded tokens'] "
    frame = shown.locator(drawn).first.bounding_box()
    assert frame is not None
    for name in shown.locator(f"{drawn}text").all():  # every name lies within the picture
        box = name.bounding_box()
        assert box is not None and box["x"] + box["width"] <= frame["x"] + frame["width"] + 1, name.text_content()
        assert box["y"] >= frame["y"] - 1 and box["y"] + box["height"] <= frame["y"] + frame["height"] + 1
    if width == 1280:  # the table of verdicts needs no scrolling on a desktop
        assert shown.evaluate("(t => t.scrollWidth <= t.clientWidth)(document.querySelector('#served ~ .scroll'))")
    shown.close()
