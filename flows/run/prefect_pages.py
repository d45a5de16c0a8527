"""What a run shows in Prefect beside its states: plan, progress, report, as Prefect artifacts.

A view, as MLflow is: where the server is away, the run goes on and says at its end what is not shown.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import TypeVar, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.settings import PREFECT_API_URL

from flows.report.build import Report
from flows.report.plots.style import title_of
from tasks.runtime.process.servers import answers

PROGRESS_S = 2.0
ANSWER_S = 10.0  # a refused connection answers at once, a busy server does not
MLFLOW_UI = "needs MLflow's pages: `quench up` serves them"
T = TypeVar("T")


class PrefectPages:
    """The Prefect artifacts of one run.

    Attributes:
        trouble: What the server did not take; the run's folder has it.
    """

    def __init__(self) -> None:
        self.trouble: list[str] = []
        self._progress: dict[str, tuple[UUID | None, float]] = {}

    def plan(self, markdown: str) -> None:
        """Hit or make, before the run."""
        self._show(
            "the plan",
            lambda: create_markdown_artifact(markdown, key="plan", description="hit or make, before the run"),
        )

    def progress(self, key: str, percent: float) -> None:
        """How far a step is, every two seconds."""
        name, before = self._progress.get(key, (None, 0.0))
        now = time.monotonic()
        if before and now - before < PROGRESS_S and percent < 100.0:
            return
        if name is None:
            own = artifact_key("progress", key)
            created = self._show("progress", lambda: create_progress_artifact(percent, key=own, description=key))
            name = cast("UUID | None", created)
        else:
            self._show("progress", lambda: update_progress_artifact(name, progress=percent))
        self._progress[key] = (name, now)

    def report(self, report: Report) -> None:
        """Text, table, pictures, and where the whole page lies."""
        self._show("the report", lambda: _create_report(report))

    def link(self, url: str) -> None:
        """To the page that compares the arms in MLflow."""
        text = "compare the arms in MLflow"
        self._show("a link", lambda: create_link_artifact(url, link_text=text, key="mlflow", description=MLFLOW_UI))

    def _show(self, what: str, create: Callable[[], T]) -> T | None:
        """Ask whether the server answers: else a client would try for a minute, while nobody follows the child."""
        try:
            if answers(str(PREFECT_API_URL.value()), timeout_s=ANSWER_S):
                return create()
            self.trouble.append(f"{what}: its server does not answer")
        except httpx.HTTPError as error:
            self.trouble.append(f"{what}: {type(error).__name__}: {error}")
        return None


def _create_report(report: Report) -> None:
    create_markdown_artifact(report.markdown, key="report", description="the comparison of all arms")
    create_table_artifact(report.table, key="arms", description="published metrics, test")
    for name, svg in report.pictures.items():
        image = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
        create_image_artifact(image, key=artifact_key(name), description=title_of(svg))
    place = (report.folder / "report.html").as_uri()
    create_link_artifact(place, link_text=place, key="report-page", description="browsers open it from the address bar")


def artifact_key(*parts: str) -> str:
    """A Prefect artifact key: small letters, digits and dashes."""
    return "".join(char if char.isalnum() else "-" for char in "-".join(parts).lower())
