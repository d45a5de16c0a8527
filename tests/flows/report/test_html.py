"""The page's parts: fronts, waterfall, gate, what fits; each from its key of report.json, each left out without it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from rich.console import Console

from flows.gate.checks import Outcome
from flows.report.build import evaluate, print_report
from flows.report.html import figures, page, verdict
from flows.report.plots.fronts import Point, front
from flows.report.plots.style import as_picture
from flows.report.plots.waterfall import bars
from flows.report.text import gate_sentence, markdown, waterfall_sentence
from flows.results.power import sentence as power_sentence
from flows.results.read import read_run
from recipes.models.headers import read_headers
from recipes.schemes.serve_file import describe
from recipes.schemes.slugs import parse_scheme
from tests.chromium import chromium
from tests.flows import outcomes
from tests.flows.synthetic_run import BASE, SHAPES, SyntheticRun, dump

BROKEN = {"what": "Scales are NaN.", "where": "layers.3", "why": "a channel is zero", "next": "raise calibrate.rows"}
CONTROL = "awq-w4-g128.calib-random"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """report.json of a run with controls and a failed scheme, whose artifacts say how they are served."""
    home = tmp_path_factory.mktemp("home")
    shapes = {**SHAPES, CONTROL: replace(SHAPES["awq-w4-g128"], kl=0.02, calibration="random")}
    folder = SyntheticRun(home, test=160, general=40, shapes=shapes, broken={"quantize/gptq-w4-g32": BROKEN}).write()
    for path in home.glob("store/quantize/*/files"):
        slug = path.parent.name.rsplit("-", 1)[0].split(".")[0]
        dump(path / "serve.json", describe(read_headers(BASE), name=slug, scheme=parse_scheme(slug)))
    return evaluate(read_run(folder, home))


@pytest.fixture(scope="module")
def full(plain: dict[str, Any]) -> dict[str, Any]:
    """The same with everything that later parts add."""
    return {**plain, **outcomes.all_of_them()}


@pytest.fixture(scope="module")
def drawn(full: dict[str, Any]) -> dict[str, str]:
    """Every figure of the full report; a second each."""
    return figures(full)


def html(report: dict[str, Any], svgs: Mapping[str, str] | None = None) -> str:
    """The page, without figures where a test does not look at them."""
    return page(report, svgs or {})


def words(text: str) -> str:
    """What is read: without styles, drawings' coordinates and tags."""
    text = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


# ---- fronts


def point(slug: str, x: float, y: float) -> Point:
    return Point(slug=slug, colour="", marker="", filled=True, x=x, y=y, low=y, high=y)


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [point("a", 4, 3), point("b", 5, 1), point("c", 5, 2), point("d", 6, 2), point("e", 9, 0.5)]
    assert [one.slug for one in front(points, lower=True)] == ["a", "b", "e"]
    assert [one.slug for one in front(points, lower=False)] == ["a"]
    for kept in front(points, lower=True):
        assert not any(one.x <= kept.x and one.y < kept.y for one in points)


def test_controls_are_drawn_nowhere_and_variants_are_not_named(drawn: dict[str, str]) -> None:
    with_all = {"kl-against-size", "task-against-size", "waterfall", "domains", "layer-errors", "layer-weights"}
    assert set(drawn) == with_all
    for name, svg in drawn.items():
        assert CONTROL not in svg, name
    assert "gptq-w4-g128<" in drawn["kl-against-size"] and "gptq-w4-g128.on-base" not in drawn["kl-against-size"]
    assert "nf4-adapter" in drawn["task-against-size"] and "nf4-adapter" not in drawn["kl-against-size"]


def test_a_picture_stands_alone(drawn: dict[str, str]) -> None:
    for name, svg in drawn.items():
        alone = as_picture(svg)
        assert "var(--" in svg and "var(--" not in alone, name
        assert re.match(r'<svg width="[\d.]+" height="[\d.]+"', alone), alone[:80]


# ---- the waterfall


def test_bars_start_where_the_step_before_ended() -> None:
    found = {bar.name: bar for bar in bars(outcomes.waterfall())}
    assert list(found) == ["merged-dequantized", "gptq-w4-g128", "gptq-w4-g128.kv-fp8", "awq-w4-g128"]
    assert found["merged-dequantized"].start == 0
    for bar in list(found.values())[1:]:
        assert bar.start == pytest.approx(found[bar.before].end, abs=1e-12)
        assert bar.low < bar.end < bar.high
    assert found["gptq-w4-g128.kv-fp8"].end == pytest.approx(0.00172)


def test_the_waterfall_says_where_the_loss_goes() -> None:
    told = waterfall_sentence(outcomes.waterfall())
    assert told == (
        "gptq-w4-g128 loses least against nf4-adapter: 0.0011 nats a token on test "
        "(merge +0.00002 (no difference shown), weights +0.00110 (worse))."
    )
    cut = outcomes.waterfall()
    cut["paths"] = [{**cut["paths"][0], "steps": [], "reason": "gptq-w4-g128: failed"}]
    assert waterfall_sentence(cut) is None and waterfall_sentence(None) is None
    assert bars(cut) == []


# ---- the gate


@pytest.mark.parametrize(
    ("outcome", "sentence"),
    [
        ("pass", "gptq-w4-g128 passes the gate (4 of 4 checks on test are within their margins)."),
        (
            "worse",
            "gptq-w4-g128 does not pass the gate: it is worse (3 of 4 checks on test are within their margins). Task "
            "against merged-dequantized: −8.0 [−11.0, −5.0] points, may lose 2 points: worse.",
        ),
        (
            "undecided",
            "gptq-w4-g128 does not pass the gate: this much data cannot tell (3 of 4 checks on test are within their "
            "margins). Task against merged-dequantized: −1.2 [−3.1, +0.7] points, may lose 2 points: undecided; "
            "400 rows, about 1,900 would decide.",
        ),
    ],
)
def test_the_gate_comes_first_in_three_sentences(plain: dict[str, Any], outcome: Outcome, sentence: str) -> None:
    report = {**plain, "gate": outcomes.gate(outcome)}
    assert verdict(report) == [sentence, *plain["verdict"][:2]]
    text = words(html(report))
    assert f"gate: {outcome} {sentence}" in text
    assert text.index(sentence) < text.index("Every way to ship it") < text.index("The gate Candidate")


def test_without_a_candidate_the_reason_is_told(plain: dict[str, Any]) -> None:
    sentence = "Nothing can be promoted: no scheme of this run is fit for it."
    assert gate_sentence(outcomes.no_gate()) == sentence
    assert f"{sentence} {plain['verdict'][0]}" in words(html({**plain, "gate": outcomes.no_gate()}))
    assert outcomes.no_gate()["text"][1:] == ["gptq-w4-g128: vLLM does not read it."]


def test_every_check_has_its_own_unit(plain: dict[str, Any]) -> None:
    text = words(html({**plain, "gate": outcomes.gate()}))
    assert "bits a byte champion 0.006 bits +0.00110 [+0.00060, +0.00160] bits" in text
    assert "loss merged-dequantized 0.02 nats" in text
    assert "task base better than it +88.0 [+85.0, +91.0] points" in text


def test_a_check_that_could_not_be_made_says_why(plain: dict[str, Any]) -> None:
    gate = outcomes.gate("undecided")
    unmade = {"difference": None, "ci95": None, "n_needed": None, "reason": "champion has no such scores"}
    gate["tests"][0] |= unmade
    assert "champion has no such scores" in words(html({**plain, "gate": gate}))


def test_power_says_whether_there_are_enough_rows() -> None:
    assert power_sentence(outcomes.power()) == (
        "To show a loss of 3 points of task score with 80 % probability, in one comparison with the merged model at "
        "95 %, test needs 612 rows (gptq-w4-g128); it has 400, enough for 0 of 1 schemes."
    )
    assert power_sentence(outcomes.power()[1:]) is None


# ---- the page


def test_sections_stand_in_order_and_only_with_their_keys(
    plain: dict[str, Any], full: dict[str, Any], drawn: dict[str, str]
) -> None:
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html(full, drawn))
    assert headings == [
        "1 failed, 2 could not run for it",
        "Every way to ship it",
        "Quality against size",
        "The gate",
        "Where the loss goes",
        "How much of the gain is kept?",
        "By domain",
        "Which layers suffer",
        "Answers",
        "Comparisons",
        "Answers side by side",
        "What failed and why",
        "How to load and serve it",
        "What fits",
        "Speed on this machine",
        "On dev: for tuning; nothing here was promoted by",
        "Time and memory",
        "Decisions and fallbacks",
        "Provenance",
    ]
    left_out = {"The gate", "Where the loss goes", "What fits"}
    fewer = {name: svg for name, svg in drawn.items() if name != "waterfall"}
    older = {name: value for name, value in plain.items() if name not in ("gate", "waterfall", "fit")}
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", html(older, fewer)) == [one for one in headings if one not in left_out]


def test_an_arm_without_files_and_a_cache_that_cannot_be_computed_leave_a_page(plain: dict[str, Any]) -> None:
    failed = next(one for one in plain["fit"]["arms"] if one["arm"] == "gptq-w4-g32")
    assert failed["weights_bytes"] is None
    assert "gptq-w4-g32 – – –" in words(html(plain)).partition("What fits ")[2]
    unknown = {"kv_bytes_per_token": None, "arms": [], "examples": [], "reason": "config.json has kv_lora_rank"}
    assert "What fits Cannot be computed: config.json has kv_lora_rank." in words(html({**plain, "fit": unknown}))


def test_controls_stand_with_their_comparisons(plain: dict[str, Any]) -> None:
    text = words(html(plain))
    assert plain["arms"][CONTROL]["role"] == "control"
    assert text.index(CONTROL) > text.index("By domain")  # not in the table of what can be shipped
    assert CONTROL in text[text.index("Did the calibration data matter here? ") :]


def test_every_arm_says_how_it_is_loaded_and_served(plain: dict[str, Any]) -> None:
    loading = plain["loading"]
    shipped = [slug for slug, arm in plain["arms"].items() if arm["role"] != "control" and arm["status"] == "ok"]
    assert list(loading) == shipped and "gptq-w4-g32" not in loading
    gptq, both = loading["gptq-w4-g128"], loading["gptq-w4-g128.on-base"]
    assert gptq["vllm"].startswith("cd store/quantize/gptq-w4-g128-") and "vllm serve" in gptq["vllm"]
    assert both["vllm"] is None and "export" in both["refused"][0]
    assert both["python"].count("PeftModel") == 2 and "BitsAndBytesConfig" in loading["nf4-adapter"]["python"]
    for one in loading.values():
        compile(one["python"], "loading", "exec")
    text = html(plain)
    assert "quench export 20261124-120000-quickstart-ab12 gptq-w4-g128 gptq-w4-g128" in text
    assert gptq["vllm"].split("&& ")[1].replace('"', "&#34;") in text


def test_answers_are_escaped_and_marked(plain: dict[str, Any]) -> None:
    report = json.loads(json.dumps(plain))
    sample = report["samples"]["chosen"][0]
    sample |= {"prompt": "<script>alert(1)</script>", "reference": "a < 1 and b"}
    sample["answers"] = [{"arms": ["rtn-w4-g128"], "text": "a < 2 and b", "score": 0.5, "error": "<b>"}]
    text = html(report)
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text
    assert "a &lt; <del>1</del><ins>2</ins> and b" in text
    assert "0.50: rtn-w4-g128" in text


@pytest.mark.parametrize("width", [80, 120, 160])
def test_a_terminal_gets_the_same_words(full: dict[str, Any], width: int) -> None:
    console = Console(width=width)
    with console.capture() as captured:
        print_report(full, console)
    lines = captured.get().splitlines()
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= width and text.startswith("gptq-w4-g128 does not pass the gate: this much")
    for sentence in (waterfall_sentence(full["waterfall"]), power_sentence(full["power"])):
        assert sentence and sentence in text
    assert "failed: quantize/gptq-w4-g32: Scales are NaN (a channel is zero). Next: raise calibrate.rows." in text
    assert "24 GiB, 64 x 131,072 tokens: no arm fits." in text
    assert ("no room for" in text) == (width < 160)
    heads = next(line for line in lines if line.split()[:1] == ["arm"])
    assert all(word in heads for word in ("size", "task", "KL"))


# ---- in a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def written(full: dict[str, Any], drawn: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(full, drawn), encoding="utf-8")
    return path


@pytest.mark.system
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (360, "light")])
def test_everything_is_seen_and_nothing_sticks_out(browser: Browser, written: Path, width: int, scheme: Any) -> None:
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.goto(written.as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert (
        shown.evaluate(  # tables scroll in boxes of their own; nothing else is wider than the page
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg, .sr')"
            " && e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
        )
        == []
    )
    for text in ("this much data cannot tell", "Where the loss goes", "Nobody picked them", "vllm serve"):
        assert text in shown.inner_text("main") or text in shown.content()
    labels = shown.evaluate("[...document.querySelectorAll('figure svg text')].map(t => t.textContent)")
    assert "gptq-w4-g128.kv-fp8" in labels and "loss above the model as trained, nats a token" in labels
    assert complaints == []
    shown.close()


@pytest.mark.system
def test_paper_shows_what_is_folded(browser: Browser, written: Path, tmp_path: Path) -> None:
    shown = browser.new_page(viewport={"width": 800, "height": 1100})
    shown.goto(written.as_uri())
    folded = shown.locator("details:not([open]) table td").first
    assert not folded.is_visible()
    shown.emulate_media(media="print")
    assert folded.is_visible()
    shown.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
    shown.close()


def test_a_run_on_a_cluster_says_where_each_step_ran(plain: dict[str, Any]) -> None:
    node, there = {"host": "gpu-7", "address": "10.0.0.7", "id": "0123abcd4567"}, "quantize/awq-w4-g128"
    steps = [{**one, "node": node} if one["key"] == there else one for one in plain["steps"]]
    placed = {**plain, "steps": steps}
    told = f"gpu-7 (10.0.0.7, node 0123abcd): {there}"
    assert told in words(html(placed)) and f"On {told}." in markdown(placed)
    assert "gpu-7" not in html(plain) + markdown(plain)
