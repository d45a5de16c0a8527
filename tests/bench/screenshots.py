"""docs/screenshots/: what people look at, of the latest run in a home. `python -m tests.bench.screenshots HOME`.

report.html on a desktop and on a phone, MLflow's page that compares the arms and that of the registered model (after
`quench promote`), Prefect's pages of the run and of the deployment that retrains.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import httpx
from mlflow.tracking import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, Page

from tasks.runtime.process.launch import CHECKOUT
from tests.chromium import chromium

SHOTS = CHECKOUT / "docs" / "screenshots"
COLOURS = 128  # of the palette: a third of the bytes, and no difference to be seen
SETTLE_MS = 6_000  # plots of the servers' pages move into place
WAIT_MS = 120_000


def save(page: Page, name: str) -> None:
    """One screen as a PNG with a palette."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT).save(SHOTS / f"{name}.png", optimize=True)


def opened(browser: Browser, url: str, *, width: int, height: int) -> Page:
    """A page of so many pixels, in light colours; a server may take its time to start."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    return page


def report(browser: Browser, folder: Path) -> None:
    """The top of report.html, and the part from the waterfall (else the plots) on a phone."""
    url = (folder / "report.html").as_uri()
    save(opened(browser, url, width=1200, height=1500), "report")
    page = opened(browser, url, width=390, height=844)
    save(page, "report-phone")


def mlflow(browser: Browser, url: str, home: Path, run: str) -> None:
    """The page behind `Compare the arms`, and the registered model's last version where something was promoted."""
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    name = json.loads((home / "runs" / run / "steps.json").read_text(encoding="utf-8"))["name"]
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None, name
    arms = client.search_runs([experiment.experiment_id], f"tags.`quench.run` = '{run}' and tags.`quench.kind` = 'arm'")
    ids = quote(json.dumps([one.info.run_id for one in arms][::-1]))
    place = f"{url}/#/compare-runs?runs={ids}&experiments=%5B%22{experiment.experiment_id}%22%5D"
    page = opened(browser, place, width=1500, height=1150)
    page.get_by_text("Parallel Coordinates Plot").first.wait_for()
    settled(page)
    save(page, "mlflow-compare")
    for version in client.search_model_versions(f"name='{name}'", max_results=1):
        page = opened(browser, f"{url}/#/models/{name}/versions/{version.version}", width=1500, height=1250)
        page.get_by_text("Aliases", exact=False).first.wait_for()
        settled(page)
        save(page, "mlflow-model")


def settled(page: Page) -> None:
    """Without MLflow's assistant, which takes a quarter of the width."""
    page.get_by_text("MLflow Assistant").first.locator("xpath=ancestor::*[.//button][1]//button").last.click()
    page.wait_for_timeout(SETTLE_MS)


def prefect(browser: Browser, url: str) -> None:
    """The latest completed run with its artifacts, and the deployment that retrains, with a schedule."""
    wanted = {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    run = httpx.post(f"{url}/api/flow_runs/filter", json=wanted).json()[0]["id"]
    page = opened(browser, f"{url}/runs/flow-run/{run}", width=1500, height=1250)
    page.get_by_text("Artifacts", exact=True).first.wait_for()
    page.wait_for_timeout(SETTLE_MS)
    page.get_by_text("Artifacts", exact=True).first.click()
    page.wait_for_timeout(SETTLE_MS)
    save(page, "prefect-run")
    deployment = httpx.get(f"{url}/api/deployments/name/retrain/default").raise_for_status().json()
    if not deployment["schedules"]:
        weekly = [{"schedule": {"cron": "0 3 * * 1", "timezone": "Europe/Berlin"}, "active": True}]
        httpx.post(f"{url}/api/deployments/{deployment['id']}/schedules", json=weekly).raise_for_status()
    page = opened(browser, f"{url}/deployments/deployment/{deployment['id']}", width=1500, height=1250)
    page.wait_for_timeout(SETTLE_MS)
    save(page, "prefect-deployment")


def main() -> None:
    """All of them, on the pages of `quench up`."""
    home = Path(sys.argv[1]).resolve()
    folder = (home / "runs" / "latest").resolve()
    SHOTS.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "flows.cli", "up"]
    up = subprocess.Popen(words, env={**os.environ, "QUENCH_HOME": str(home)}, stdout=subprocess.PIPE, text=True)
    try:
        assert up.stdout is not None
        ready = next(line for line in up.stdout if line.startswith("ready"))
        urls = ready.split()
        with chromium() as browser:
            report(browser, folder)
            mlflow(browser, urls[4], home, folder.name)
            prefect(browser, urls[2])
    finally:
        up.terminate()
        up.wait(60)
    for path in sorted(SHOTS.glob("*.png")):
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
