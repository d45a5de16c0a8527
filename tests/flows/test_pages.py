"""What people open after a run: MLflow's pages and Prefect's, in a real browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from playwright.sync_api import Error, Page, expect

from tasks.runtime.process.launch import Launcher, child_env
from tasks.runtime.process.ports import free_port
from tests.chromium import chromium
from tests.conftest import World
from tests.flows.test_run import ARMS

pytestmark = pytest.mark.system
WAIT_MS = 60_000  # both pages load megabytes of script on two busy cores
HIGH = {"width": 1500, "height": 2400}  # so that long tables show all their rows


# What the servers' own pages ask for in vain: an icon of Prefect's, the user of an MLflow without accounts.
KNOWN = ("/ico/undefined.svg", "/mlflow/users/current")


@pytest.fixture
def page() -> Iterator[Page]:
    """A page; at the end, nothing that it asked for was missing and no script of it failed."""
    complaints: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport=HIGH)
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        page.on("response", lambda one: complaints.append(f"{one.status} {one.url}") if one.status >= 400 else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
    assert [one for one in complaints if not one.endswith(KNOWN)] == []


def test_mlflow_shows_the_report_and_compares_the_arms(small: World, tmp_path: Path, page: Page):
    store = f"sqlite:///{small.home / 'mlflow.db'}"
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("small").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`quench.kind` = 'run'")
    url = f"http://127.0.0.1:{(port := free_port())}"
    mlflow = str(Path(sys.executable).with_name("mlflow"))
    with Launcher() as launcher:
        launcher.start(
            ["exec", "--", mlflow, "ui", "--workers", "1", "--port", str(port), "--backend-store-uri", store],
            env=child_env() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            cwd=tmp_path,
            log=tmp_path / "log.txt",
        )
        _open(page, f"{url}/#/experiments/{experiment}/runs/{parent.info.run_id}")
        link = page.get_by_role("link", name="Compare the arms").get_attribute("href")
        page.screenshot(path=tmp_path / "mlflow-run.png")
        page.goto(f"{url}/{link}")
        for slug in ARMS:
            expect(page.get_by_text(slug, exact=True).first).to_be_visible()
        expect(page.get_by_text("kl_mean", exact=True).first).to_be_visible()
        expect(page.get_by_text("Parallel Coordinates Plot")).to_be_visible()
        expect(page.locator(".js-plotly-plot").first).to_be_visible()
        page.screenshot(path=tmp_path / "mlflow-compare.png")
        page.goto(f"{url}/#/experiments/{experiment}/runs/{parent.info.run_id}/artifacts/figures/kl-against-size.svg")
        expect(page.locator("img[src^='blob:'], img[src^='data:']").first).to_be_visible()
        page.goto("about:blank")  # between two artifacts of one run, the page keeps the first one
        page.goto(f"{url}/#/experiments/{experiment}/runs/{parent.info.run_id}/artifacts/report.html")
        expect(page.frame_locator("iframe").get_by_text("Quality against size")).to_be_visible()


def test_prefect_shows_the_flow_with_its_artifacts(world: World, prefect_api: str, tmp_path: Path, page: Page):
    # A run of its own, on this process's server: the small run may have gone to the other worker's.
    replace(world, api=prefect_api).quench("run", str(world.recipe))
    url = prefect_api.removesuffix("/api")
    _open(page, f"{url}/artifacts")
    search = page.get_by_role("searchbox", name="Search artifacts")  # the list itself holds only what is scrolled to
    for name in ("report", "arms", "plan", "kl-against-size", "report-page", "mlflow"):
        search.fill(name)
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    page.goto(f"{url}/artifacts/key/report")
    page.locator("a[href^='/artifacts/artifact/']").first.click()
    expect(page.get_by_text("What did each merge base cost?").first).to_be_visible()
    page.goto(f"{url}/artifacts/key/kl-against-size")
    page.locator("a[href^='/artifacts/artifact/']").first.click()
    picture = page.locator("img[src^='data:image/svg+xml']").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 400
    page.goto(f"{url}/artifacts/key/mlflow")
    page.locator("a[href^='/artifacts/artifact/']").first.click()
    expect(page.get_by_role("link", name="compare the arms in MLflow")).to_be_visible()
    page.goto(f"{url}/flows")
    page.get_by_text("finetune-and-quantize").first.click()
    expect(page.get_by_text("Completed").first).to_be_visible()
    page.screenshot(path=tmp_path / "prefect.png")


def _open(page: Page, url: str) -> None:
    """Load a page of a server that may still be starting."""
    for _ in range(120):
        try:
            page.goto(url)
        except Error as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            page.wait_for_timeout(500)
        else:
            return
    raise AssertionError(f"{url} did not answer within a minute")
