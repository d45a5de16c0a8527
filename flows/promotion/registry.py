"""MLflow's Model Registry: a view of promotions.jsonl, made again from it whenever something is decided.

Every version that was judged is a version there, with its files as hard links where that is possible; alias `champion`
is on the one that ships, `challenger` on the one that was judged last and did not pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.exc import SQLAlchemyError

from flows.promotion.evidence import record_folder
from flows.promotion.journal import Promotion, challenger, champion, versions
from flows.tracking.connection import client, open_experiment
from flows.tracking.files import link_tree, lost_folder
from flows.tracking.moved import follow_home
from flows.tracking.tracker import tracking_uri
from recipes.problem import RecipeError
from recipes.secrets import hide
from tasks.runtime.store.open import open_store

DESCRIPTION_CHARS = 5000  # the column of MLflow's database
VERSION, ARTIFACT = "quench.version", "quench.artifact"
UNWANTED = str.maketrans(dict.fromkeys("/:.%\"'", "-"))  # MLflow refuses them in a logged model's name


def sync(home: Path, model: str, lines: Sequence[Promotion]) -> list[str]:
    """Give the registry what it lacks of the record; returns what it refused, in words.

    Doing it twice adds nothing. A version that is neither in the store nor in the registry any more (its database was
    lost) cannot come back: that is said, too.
    """
    if not lines:
        return []
    try:
        return _Registry(home, model).sync(lines)
    except RecipeError as error:
        return [f"the registry was not written: {problem.what}; {problem.next}" for problem in error.problems]
    except (MlflowException, SQLAlchemyError, OSError) as error:
        return [f"the registry was not written: {hide(str(error).splitlines()[0])}"]


class _Registry:
    def __init__(self, home: Path, model: str) -> None:
        self.home, self.model = home, model
        self.client = client(home)
        self.trouble: list[str] = []

    def sync(self, lines: Sequence[Promotion]) -> list[str]:
        follow_home(self.home)
        self._model()
        registered = self._registered(versions(lines))
        for number, line in sorted(versions(lines).items()):
            stored = (self.home / line.path / "manifest.json").is_file()
            if number in registered:
                self._tag(registered[number], line)
                self._link_again(registered[number], line, stored=stored)
            elif stored:
                registered[number] = self._register(line)
            else:
                self.trouble.append(f"version {number} is not in the store any more: {line.path}")
        self._alias("champion", champion(lines), registered)
        self._alias("challenger", challenger(lines), registered)
        return self.trouble

    def _model(self) -> None:
        try:
            self.client.create_registered_model(self.model, tags={"quench": "promotions.jsonl"})
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise

    def _registered(self, known: Mapping[int, Promotion]) -> dict[int, str]:
        """Our version -> the registry's; they are the same while nobody else registers under this name.

        Another home may: its versions have our numbers, and other artifacts.
        """
        numbers: dict[int, str] = {}
        token = None
        while True:
            page = self.client.search_model_versions(f"name='{self.model}'", page_token=token)
            for entry in page:
                number = entry.tags.get(VERSION, "")
                ours = known.get(int(number)) if number.isdecimal() else None
                if ours is not None and entry.tags.get(ARTIFACT) == ours.digest:
                    numbers[ours.version] = entry.version
            token = page.token
            if not token:
                return numbers

    def _register(self, promotion: Promotion) -> str:
        """A version with the artifact's files; returns the registry's number."""
        experiment, run = self._origin(promotion)
        place, logged = self._place(promotion, run, experiment)
        card = record_folder(self.home, promotion) / "card.md"
        return self.client.create_model_version(
            self.model,
            place,
            run_id=run,
            # A server behind HTTP refuses a place that is not below a model that is named; without one, MLflow would
            # look the model up in the process-wide store, which is ours only where a user set it.
            model_id=logged if tracking_uri(self.home).startswith("http") else None,
            tags=self._tags(promotion, run, experiment),
            description=_described(card.read_text(encoding="utf-8")) if card.exists() else None,
        ).version

    def _place(self, promotion: Promotion, run: str | None, experiment: str) -> tuple[str, str | None]:
        """Where a version's files lie, and the logged model that has them; None where the store's bucket has them."""
        stored = open_store(self.home).place_in_bucket(self.home / promotion.path)
        if stored and tracking_uri(self.home).startswith("http"):
            return stored, None
        files = self.home / promotion.path / "files"
        logged = self.client.create_logged_model(
            experiment,
            name=promotion.arm.translate(UNWANTED),
            source_run_id=run,
            tags=self._tags(promotion, run, experiment),
        )
        place = logged.artifact_location
        if place.startswith("file:"):
            link_tree(files, Path(local_file_uri_to_path(place)))
        else:
            self.client.log_model_artifacts(logged.model_id, str(files))
        self.client.finalize_logged_model(logged.model_id, "READY")
        return place, logged.model_id

    def _link_again(self, number: str, promotion: Promotion, *, stored: bool) -> None:
        """Put back the files of a version whose folder on this machine is gone; say where the store lacks them too."""
        source = self.client.get_model_version(self.model, number).source
        lost = lost_folder(source)
        if lost is None:
            return
        if stored:
            link_tree(self.home / promotion.path / "files", lost)
        else:
            self.trouble.append(f"version {promotion.version} has lost its files, and the store has none: {source}")

    def _origin(self, promotion: Promotion) -> tuple[str, str | None]:
        """Experiment and MLflow run that the artifact comes from; the run is None where MLflow has lost it."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        of_run = f"tags.`quench.run` = '{promotion.run}' and tags.`quench.kind` = 'run'"
        for run in self.client.search_runs(experiments, of_run, max_results=1):
            return run.info.experiment_id, run.info.run_id
        opened = open_experiment(self.client, self.home, self.model)
        self.trouble += opened.notes
        return opened.id, None

    def _tags(self, promotion: Promotion, run: str | None, experiment: str) -> dict[str, str]:
        report = f"#/experiments/{quote(experiment)}/runs/{run}/artifacts/report.html" if run else ""
        return {
            VERSION: str(promotion.version),
            "quench.gate": promotion.outcome,
            "quench.run": promotion.run,
            "quench.arm": promotion.arm,
            ARTIFACT: promotion.digest,
            "quench.recipe": promotion.recipe,
            "quench.dataset": promotion.dataset or "unknown",
            "quench.path": promotion.path,
            "quench.report": report or f"runs/{promotion.run}/report.html",
        }

    def _tag(self, version: str, promotion: Promotion) -> None:
        """The gate's last word on a version that was there already."""
        self.client.set_model_version_tag(self.model, version, "quench.gate", promotion.outcome)

    def _alias(self, alias: str, promotion: Promotion | None, registered: dict[int, str]) -> None:
        """Move an alias, or take it away; one call each, and the caller holds the lock."""
        now = self.client.get_registered_model(self.model).aliases.get(alias)
        wanted = registered.get(promotion.version) if promotion else None
        foreign = now is not None and now not in registered.values()
        if foreign and wanted is not None:
            self.trouble.append(
                f"alias {alias} was on version {now} of {self.model}, which is none of this home's: two homes that "
                "promote under one name take it from each other; promote.model_name gives another name"
            )
        if wanted is not None and wanted != now:
            self.client.set_registered_model_alias(self.model, alias, wanted)
        elif wanted is None and now is not None and not foreign:
            self.client.delete_registered_model_alias(self.model, alias)


def _described(card: str) -> str:
    """A card without its front matter, as long as MLflow's database takes."""
    return card.removeprefix("---\n").partition("\n---\n")[2].strip()[:DESCRIPTION_CHARS]
