"""docs/screenshots/: what people look at, of the latest run in a home. `python -m tests.bench.screenshots HOME`.

Four pictures: report.html on a desktop and on a phone, MLflow's page that compares the arms, Prefect's page of the run.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import httpx
from mlflow.tracking import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, Page

from flows.server import free_port
from tasks.runtime.launch import CHECKOUT, Launcher, child_env
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


def mlflow(browser: Browser, launcher: Launcher, home: Path, run: str) -> None:
    """The page behind `Compare the arms`."""
    store = f"sqlite:///{home / 'mlflow.db'}"
    client = MlflowClient(store)
    name = json.loads((home / "runs" / run / "steps.json").read_text(encoding="utf-8"))["name"]
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None, name
    arms = client.search_runs([experiment.experiment_id], f"tags.`quench.run` = '{run}' and tags.`quench.kind` = 'arm'")
    ids = quote(json.dumps([one.info.run_id for one in arms][::-1]))
    port = free_port()
    argv = ["mlflow", "ui", "--workers", "1", "--port", str(port), "--backend-store-uri", store]
    serve(launcher, argv, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, f"http://127.0.0.1:{port}/health")
    page = opened(
        browser,
        f"http://127.0.0.1:{port}/#/compare-runs?runs={ids}&experiments=%5B%22{experiment.experiment_id}%22%5D",
        width=1500,
        height=1150,
    )
    page.get_by_text("Parallel Coordinates Plot").first.wait_for()
    page.get_by_text("MLflow Assistant").first.locator("xpath=ancestor::*[.//button][1]//button").last.click()
    page.wait_for_timeout(SETTLE_MS)
    save(page, "mlflow-compare")


def prefect(browser: Browser, launcher: Launcher, home: Path) -> None:
    """The latest completed run with its artifacts."""
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    more = {"PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": api, "PREFECT_SERVER_UI_API_URL": api}
    more |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    serve(launcher, ["prefect", "server", "start", "--port", str(port)], more, f"{api}/health")
    wanted = {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    run = httpx.post(f"{api}/flow_runs/filter", json=wanted).json()[0]["id"]
    page = opened(browser, f"http://127.0.0.1:{port}/runs/flow-run/{run}", width=1500, height=1250)
    page.get_by_text("Artifacts", exact=True).first.wait_for()
    page.wait_for_timeout(SETTLE_MS)
    page.get_by_text("Artifacts", exact=True).first.click()
    page.wait_for_timeout(SETTLE_MS)
    save(page, "prefect-run")


def serve(launcher: Launcher, argv: list[str], more: dict[str, str], health: str) -> None:
    """Start a program of this environment; wait until it answers."""
    program = str(Path(sys.executable).with_name(argv[0]))
    log = Path(tempfile.mkdtemp()) / "log.txt"
    launcher.start(["exec", "--", program, *argv[1:]], env=child_env() | more, cwd=log.parent, log=log)
    with httpx.Client(transport=httpx.HTTPTransport(retries=9)) as client:  # waits double: 0.5 s to 128 s
        client.get(health, timeout=WAIT_MS / 1000).raise_for_status()


def main() -> None:
    """All four."""
    home = Path(sys.argv[1]).resolve()
    folder = (home / "runs" / "latest").resolve()
    SHOTS.mkdir(parents=True, exist_ok=True)
    with Launcher() as launcher, chromium() as browser:
        report(browser, folder)
        mlflow(browser, launcher, home, folder.name)
        prefect(browser, launcher, home)
    for path in sorted(SHOTS.glob("*.png")):
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
