"""MLflow, only here. A view: every MLflow run is a function of steps.json, manifests and events.

Parent run = flow run; nested runs for the steps that people open (prepare ... quantize) and one per arm, all arms
with the same metric names. Weights are hard-linked where store and MLflow share a file system.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Concatenate, ParamSpec
from urllib.parse import quote

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path

from flows.mlflow_uri import shown, tracking_uri
from flows.report.inert import in_lines, inert
from flows.report.null_arms import is_unmade_null
from flows.report.served import served_figures
from flows.report.text import overview
from flows.tracking.connection import WHOLE, client, open_experiment, refused, remove, runs_of
from flows.tracking.files import link_tree, lost_folder, parted
from flows.tracking.values import PARAM_CHARS, TAG_CHARS, cut, flat, names_of, param_text, point
from recipes.secrets import hide
from tasks.runtime.process.events import read_events
from tasks.runtime.process.user import user_name
from tasks.runtime.store.local import Store, read_json
from tasks.runtime.store.open import open_store

LIVE_S = 2.0
STOP_S = 5.0  # an interrupted run has to be gone within 10
BATCH = 500  # MLflow's limit for one log_batch is 1,000 metrics
PARAMS = 25  # a batch: MLflow takes 100, but also no request above 1 MB, and a value may be 6,000 letters of six bytes
DIGEST_CHARS = 36  # a dataset's
STAGES = ("prepare", "train", "merge", "reference", "calibrate", "quantize")
P = ParamSpec("P")
SPLITS = {"train": "training", "dev": "validation", "test": "test"}  # split -> MLflow's word for its use
LOCAL_UI = "http://127.0.0.1:5000"  # where `quench up` and `mlflow ui` listen unless the port is taken
SERVED_HEADLINE = ("served_loss", "served_answers_equal")
HEADLINE = ("task", "truncated", "ppl_test", "ppl_general", "kl_mean", "top1_agreement", "size_bytes")


def on_thread(body: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    """Let the tracker's thread make the call, in the order of the calls; do not wait.

    MLflow is a view: what it refuses is remembered and said at the end, and costs the run nothing.
    """

    def guarded(self: Tracker, *args: P.args, **more: P.kwargs) -> None:
        try:
            body(self, *args, **more)
        except (MlflowException, OSError) as error:
            self.trouble.append(f"{body.__name__}: {hide(str(error).splitlines()[0])}")

    @functools.wraps(body)
    def submitted(self: Tracker, *args: P.args, **more: P.kwargs) -> None:
        with self.lock:
            while self.calls and self.calls[0].done():
                self.calls.popleft().result()  # what is no trouble of MLflow's is a fault of ours: let it be seen
            self.calls.append(self.thread.submit(guarded, self, *args, **more))

    return submitted


class Tracker:
    """One parent run and its nested runs.

    MLflow's own calls are synchronous (its asynchronous logging loses points in silence) and all made by one thread:
    an interrupt is raised in the main thread, and inside SQLite it would leave the database locked.

    Attributes:
        thread: Makes all calls after the connection.
        calls: Those that the thread has not made yet, oldest first; under `lock`.
        trouble: What MLflow refused after the start; the store has everything.
        notes: What was put right at the start, for the run's log.
        compare_url: Page that compares the arms, once they were reported.
    """

    def __init__(self, home: Path, *, experiment: str, run: str) -> None:
        """Connect, or refuse before anything is spent.

        Raises:
            RecipeError: The tracking server does not answer, or refuses this user.
        """
        self.home, self.run = home, run
        self.uri = tracking_uri(home)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quench-mlflow")
        self.calls: deque[Future[None]] = deque()
        self.lock = threading.Lock()
        self._nested: dict[str, str] = {}
        self._sent: dict[str, int] = {}
        self._waiting: dict[str, list[Metric]] = {}
        self._flushed = 0.0
        self.parent = ""
        self.trouble: list[str] = []
        self.compare_url: str | None = None
        self._data: dict[str, DatasetInput] = {}
        try:
            mlflow.set_tracking_uri(self.uri)
            self._client = client(home)
            self.experiment, self.notes = open_experiment(self._client, home, experiment)
        except MlflowException as error:
            raise refused(self.uri, error).error() from error

    def begin_again(self) -> bool:
        """Delete what MLflow has of this run, which is written anew; False where MLflow has it whole.

        Whole: it took everything, and still has the files that it was given.

        Raises:
            RecipeError: MLflow does not answer any more, or refuses this user.
        """
        try:
            runs = runs_of(self._client, self.experiment, self.run)
            if any(WHOLE in run.data.tags for run in runs) and all(map(_has_files, runs)):
                self.close()
                return False
            remove(self._client, runs)
        except MlflowException as error:
            raise refused(self.uri, error).error() from error
        return True

    def close(self) -> None:
        """End the thread of a tracker that writes nothing."""
        self.thread.shutdown()

    @on_thread
    def start(self, recipe: Mapping[str, Any], *, tags: Mapping[str, str]) -> None:
        """Create the parent run with the recipe as parameters."""
        own = {"quench.run": self.run, "quench.kind": "run", "mlflow.user": user_name()}
        own |= {name: cut(text, TAG_CHARS) for name, text in tags.items()}
        self.parent = self._client.create_run(self.experiment, run_name=self.run, tags=own).info.run_id
        self._params(self.parent, flat(recipe))

    @on_thread
    def live(self, key: str, event: Mapping[str, Any]) -> None:
        """Pass one event of a live step on; points go out in batches every two seconds."""
        if event["kind"] != "metric" or key.split("/")[0] not in STAGES:
            return
        self._waiting.setdefault(key, []).append(point(event))
        if time.monotonic() - self._flushed > LIVE_S:
            self._flush()

    def _flush(self) -> None:
        self._flushed = time.monotonic()  # also where it fails: an outage costs one call every two seconds, not all
        for key, points in list(self._waiting.items()):
            run = self._nested_run(key, kind="step")
            self._metrics(run, points)
            self._sent[key] = self._sent.get(key, 0) + len(self._waiting.pop(key))

    @on_thread
    def step(self, record: Mapping[str, Any]) -> None:
        """Write the nested run of one recorded step: curve, result, files. A hit shows the curve of its making."""
        if record["stage"] not in STAGES:
            return
        self._flush()
        run = self._nested_run(record["key"], kind="step")
        self._tag(run, {"quench.status": record["status"], "quench.fingerprint": record["fingerprint"]})
        if record["path"] is None:
            self._client.set_terminated(run, "FAILED" if record["status"] == "failed" else "KILLED")
            return
        folder = self.home / record["path"]
        manifest = read_json(folder / "manifest.json")
        events = (event for event, _ in read_events(folder / "files" / "events.jsonl"))
        points = [point(event) for event in events if event["kind"] == "metric"]
        self._metrics(run, points[self._sent.get(record["key"], 0) :])
        self._numbers(run, {**manifest["result"], "seconds": manifest["seconds"]})
        self._numbers(run, {name: manifest[name] for name in ("peak_rss_gib", "peak_gpu_gib")})
        self._params(run, flat(manifest["identity"]["params"]))
        self._tag(run, {"quench.digest": manifest["digest"], "quench.path": record["path"]})
        self._files(run, folder, record["stage"])
        self._log_datasets(run, record["stage"], folder, manifest)
        self._client.set_terminated(run, "FINISHED")

    def _log_datasets(self, run: str, stage: str, folder: Path, manifest: Mapping[str, Any]) -> None:
        """What a step made or read of data, as MLflow's datasets; what it made is the parent's, too."""
        if stage == "prepare":
            self._data = _datasets(folder, manifest)
            self._client.log_inputs(run, list(self._data.values()))
            self._client.log_inputs(self.parent, list(self._data.values()))
        if stage == "train":
            self._client.log_inputs(run, [dataset for split, dataset in self._data.items() if split != "test"])
        if stage == "calibrate":
            self._calibset(run, folder / "files", digest=manifest["digest"])
            self._calibset(self.parent, folder / "files", digest=manifest["digest"])
        elif calibset := manifest["inputs"].get("calibset"):
            self._calibset(run, self.home / calibset["path"], digest=calibset["digest"])

    @on_thread
    def report(self, report: Mapping[str, Any], folder: Path, *, pictures: Mapping[str, str]) -> None:
        """One nested run per arm, all with the same metric names; headline metrics and the report on the parent.

        The parent gets the tables of arms and comparisons and the page's figures, too.
        """
        shown = {slug: arm for slug, arm in report["arms"].items() if not is_unmade_null(arm)}
        for slug, arm in shown.items():
            self._arm(slug, arm, served=served_figures(slug, report))
        if choice := report["choice"]:
            self._params(self.parent, {"merge.chosen": choice["candidate"]})
            self._numbers(self.parent, {"choose": {name: choice.get(name) for name in ("loss", "difference")}})
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self._client.log_artifact(self.parent, str(path))
        for name, columns in (("arms", _arm_columns(report)), ("comparisons", _comparison_columns(report))):
            if any(columns.values()):
                self._client.log_table(self.parent, columns, f"tables/{name}.json")
        for name, svg in pictures.items():
            self._client.log_text(self.parent, svg, f"figures/{name}.svg")
        arms = json.dumps([self._nested[f"arm/{slug}"] for slug in shown], separators=(",", ":"))
        link = f"#/compare-runs?runs={quote(arms)}&experiments={quote(json.dumps([self.experiment]))}"
        self.compare_url = f"{self._pages()}/{link}"
        note = "\n".join([f"[Compare the arms]({link})", "", inert("\n".join(overview(in_lines(report))))])
        self._client.set_tag(self.parent, "mlflow.note.content", cut(note, TAG_CHARS))

    def _arm(self, slug: str, arm: Mapping[str, Any], *, served: Mapping[str, float]) -> None:
        """The nested run of one arm with what an engine made of it, and its headline metrics on the parent."""
        run = self._nested_run(f"arm/{slug}", kind="arm")
        metrics = {name: cell["value"] for name, cell in arm["metrics"].items()}
        self._numbers(run, metrics)
        intervals = {name: cell["ci95"] for name, cell in arm["metrics"].items() if cell["ci95"]}
        for name, (low, high) in intervals.items():
            self._numbers(run, {f"{name}.low": low, f"{name}.high": high})
        self._numbers(run, served)
        self._params(run, {"arm": slug, **{name: arm[name] for name in ("role", "merge_base", "ranked")}})
        self._tag(run, {"quench.status": arm["status"]})
        if "test" in self._data:
            self._client.log_inputs(run, [self._data["test"]])
        self._client.set_terminated(run, "FAILED" if arm["status"] == "failed" else "FINISHED")
        self._numbers(self.parent, {f"{name}/{slug}": metrics.get(name) for name in HEADLINE})
        self._numbers(self.parent, {f"{name}/{slug}": served[name] for name in SERVED_HEADLINE if name in served})

    def _pages(self) -> str:
        """Address of MLflow's pages: of the server that is written to, else of this home's `quench up`."""
        up = self.home / "up.json"
        return shown(self.uri) if self.uri.startswith("http") else read_json(up)["mlflow"] if up.exists() else LOCAL_UI

    def end(self, status: str, *, hurry: bool = True) -> None:
        """Close the parent run (completed, failed or stopped) and wait; after a stop, in a hurry, not for long."""
        self._close(status)
        undone = wait(self.calls, timeout=STOP_S if status == "stopped" and hurry else None).not_done
        self.thread.shutdown(wait=False, cancel_futures=True)
        if undone:
            self.trouble.append(f"{len(undone)} calls were not made within {STOP_S:g} s of the stop")
        else:
            self.calls[-1].result()

    @on_thread
    def _close(self, status: str) -> None:
        if self.parent:
            mapped = {"completed": "FINISHED", "failed": "FAILED"}.get(status, "KILLED")
            for run in self._nested.values():
                if self._client.get_run(run).info.status == "RUNNING":
                    self._client.set_terminated(run, "KILLED")
            self._client.set_terminated(self.parent, mapped)
            if not self.trouble:
                self._tag(self.parent, {WHOLE: "yes"})

    def _nested_run(self, key: str, *, kind: str) -> str:
        if key not in self._nested:
            tags = {"mlflow.parentRunId": self.parent, "quench.run": self.run, "quench.kind": kind, "quench.key": key}
            name = key.removeprefix("arm/")
            self._nested[key] = self._client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        return self._nested[key]

    def _calibset(self, run: str, files: Path, *, digest: str) -> None:
        """The calibration set as a dataset of the run; MLflow takes 36 characters of its digest."""
        source = json.dumps({"uri": str(files / "calibset.parquet")})
        dataset = Dataset(name=files.parent.name, digest=digest[:DIGEST_CHARS], source_type="local", source=source)
        tags = [InputTag("mlflow.data.context", "calibration"), InputTag("sha256", digest)]
        self._client.log_inputs(run, [DatasetInput(dataset, tags)])

    def _metrics(self, run: str, points: list[Metric]) -> None:
        for start in range(0, len(points), BATCH):
            self._client.log_batch(run, metrics=points[start : start + BATCH])

    def _numbers(self, run: str, values: Mapping[str, Any]) -> None:
        """Numbers become metrics, nested dicts of numbers too (`a/b`); everything else stays in the manifest."""
        now = int(time.time() * 1000)
        numbers = flat(values, separator="/")
        names = names_of(numbers)
        points = [
            Metric(key=names[key], value=float(value), timestamp=now, step=0)
            for key, value in numbers.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        self._metrics(run, points)

    def _params(self, run: str, values: Mapping[str, Any]) -> None:
        names = names_of(values)
        params = [Param(names[key], cut(param_text(value), PARAM_CHARS)) for key, value in values.items()]
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(run, params=params[start : start + PARAMS])

    def _tag(self, run: str, tags: Mapping[str, str]) -> None:
        self._client.log_batch(run, tags=[RunTag(key, cut(value, TAG_CHARS)) for key, value in tags.items()])

    def _files(self, run: str, folder: Path, name: str) -> None:
        """The artifact's manifest and files in the MLflow run, as hard links where that is possible."""
        uri = self._client.get_run(run).info.artifact_uri
        if uri is None or not uri.startswith("file:"):
            if place := self._store.place_in_bucket(folder):
                self._by_reference(run, folder / "files", name, place=place)
            else:
                self._client.log_artifacts(run, str(folder / "files"), name)
            self._client.log_artifact(run, str(folder / "manifest.json"))
            return
        root = Path(local_file_uri_to_path(uri))
        link_tree(folder / "files", root / name)
        link_tree(folder, root, names=("manifest.json",))

    @functools.cached_property
    def _store(self) -> Store:
        return open_store(self.home)

    def _by_reference(self, run: str, files: Path, name: str, *, place: str) -> None:
        """Send the small files; of weights, which the bucket has already, references.json says where."""
        small, references = parted(files, place)
        for file, path in small.items():
            self._client.log_artifact(run, str(path), str(Path(name, file).parent))
        self._client.log_dict(run, references, f"{name}/references.json")
        self._tag(run, {"quench.files": place})


def _datasets(folder: Path, manifest: Mapping[str, Any]) -> dict[str, DatasetInput]:
    """Train, dev and test of a prepared data set, each a dataset in MLflow; one file holds all three."""
    source = json.dumps({"uri": str(folder / "files" / "rows.parquet")})
    datasets: dict[str, DatasetInput] = {}
    for split, context in SPLITS.items():
        size = {"num_rows": manifest["result"]["rows"][split], "num_tokens": manifest["result"]["tokens"][split]}
        dataset = Dataset(
            name=f"{manifest['slug']}-{split}",
            digest=manifest["digest"][:DIGEST_CHARS],
            source_type="local",
            source=source,
            profile=json.dumps(size),
        )
        tags = [InputTag("mlflow.data.context", context), InputTag("sha256", manifest["digest"])]
        datasets[split] = DatasetInput(dataset, tags)
    return datasets


def _arm_columns(report: Mapping[str, Any]) -> dict[str, list[Any]]:
    """One row per arm: every metric with the ends of its interval."""
    arms = {slug: arm for slug, arm in report["arms"].items() if not is_unmade_null(arm)}
    columns: dict[str, list[Any]] = {"arm": list(arms)}
    for name in ("role", "status", "ranked"):
        columns[name] = [arm[name] for arm in arms.values()]
    for metric in next(iter(arms.values()))["metrics"] if arms else ():
        cells = [arm["metrics"][metric] for arm in arms.values()]
        columns[metric] = [cell["value"] for cell in cells]
        for end, place in (("low", 0), ("high", 1)):
            ends = [cell["ci95"] and cell["ci95"][place] for cell in cells]
            if any(value is not None for value in ends):
                columns[f"{metric}.{end}"] = ends
    if "served" in report:
        columns["served"] = [(report["served"]["arms"].get(slug) or {"verdict": None})["verdict"] for slug in arms]
        figures = [served_figures(slug, report) for slug in arms]
        for name in dict.fromkeys(name for figure in figures for name in figure):
            columns[name] = [figure.get(name) for figure in figures]
    return columns


def _comparison_columns(report: Mapping[str, Any]) -> dict[str, list[Any]]:
    """One row per comparison, with the interval that decides its verdict."""
    pairs = report["comparisons"]
    columns = {name: [pair[name] for pair in pairs] for name in ("family", "a", "b", "metric", "verdict", "difference")}
    return {**columns, **{end: [pair["ci95_adjusted"][at] for pair in pairs] for end, at in (("low", 0), ("high", 1))}}


def _has_files(run: Run) -> bool:
    """False for a step whose folder on this machine is gone: an artifact's files were linked there."""
    return "quench.digest" not in run.data.tags or lost_folder(run.info.artifact_uri) is None
