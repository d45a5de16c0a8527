"""The retrain flow: trains again where rows, recipe or packages changed, and lets the gate decide.

What a retrain saw is in the folder of the run that it made: retrain.json (digests, reasons, the decision) and
rows_seen.parquet. Both are written when the decision is on record, so a retrain that failed or was killed saw nothing,
and the next one does its work: what had finished is in the store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prefect import Flow, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import FlowRun, State
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.compose import compose
from flows.pins import Pins, pin
from flows.pipeline import WAITING_TASKS, flush_log, refusals_logged, run_validated
from flows.plan.validate import fetched, validate
from flows.promotion import promote as promotion
from flows.report.inert import in_lines, inert
from flows.report.tables import escaped
from flows.retrain.late import skip_late
from flows.retrain.notify import deliver, notification_block, send
from flows.retrain.row_changes import Changes, Rows, count, load, rows_of, save
from flows.run.credentials import settle
from flows.run.folder import run_files
from recipes.checks.check import load_and_read
from recipes.read.load import Loaded
from tasks.runtime.fingerprint import canonical, difference, fingerprint
from tasks.runtime.step import Step
from tasks.runtime.store.local import find_home, flocked, locked_now, read_json, write_json

RECORD, ROWS_SEEN = "retrain.json", "rows_seen.parquet"
NAMED = 5  # fields of the recipe that are named; the rest is counted
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RetrainOptions:
    """What is retrained. A recipe file with its overrides is one series: one memory, one retrain at a time."""

    recipe: Path
    sets: list[str]
    promote: bool

    @property
    def series(self) -> dict[str, Any]:
        """Names the retrains that this one follows."""
        return {"recipe": str(self.recipe.resolve()), "sets": self.sets}


class Before(NamedTuple):
    """The last retrain that ended with a decision."""

    run: Path
    number: int
    saw: dict[str, Any]

    @property
    def rows(self) -> Rows:
        """Rows that it read."""
        return load(self.run / ROWS_SEEN)


class RetrainOutcome(NamedTuple):
    """How a retrain ended.

    Attributes:
        word: `skipped`, `promoted`, `not promoted`, `nothing to promote` or `trained`.
        sentences: What happened, the most important sentence first.
        run: The run's folder; None where nothing was trained.
    """

    word: str
    sentences: list[str]
    run: Path | None = None


def tell_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect calls this where a retrain failed, for whatever reason."""
    if name := flow_run.parameters.get("notify"):
        send(name, f"Quench retrain of {flow_run.parameters.get('recipe', flow_run.name)}: failed", str(state.message))


@flow(  # pyright: ignore[reportCallIssue]
    name="retrain",
    flow_run_name="{recipe}",
    task_runner=ThreadPoolTaskRunner(max_workers=WAITING_TASKS),  # pyright: ignore[reportArgumentType]
    persist_result=False,
    on_failure=[tell_failure],
)
def retrain(
    recipe: str = "recipe.yaml",
    sets: list[str] | None = None,
    promote: bool = True,
    notify: str | None = None,
    notify_skipped: bool = False,
) -> State[str]:
    """Train again where something changed since the last retrain, and promote through the gate; else skip.

    Args:
        recipe: Path of the recipe file, absolute or seen from the folder where the command is typed.
        sets: Overrides of single fields, as ["train.rank=32"].
        promote: Put the run's candidate through the gate against the champion; else only train and report.
        notify: Prefect notification block that gets a message how it ended, as slack-webhook/NAME.
        notify_skipped: Send one, too, where nothing had changed.

    Returns:
        A completed state, its message says how it ended; called Skipped where nothing was trained. Its data is the
        run's folder.

    Raises:
        RecipeError: Bad input, all of it at once, before anything is spent; no such notification block.
        RunFailed: A step failed. The next retrain tries again.
        StepFailed: The champion could not be evaluated. As above.
    """
    home, log = find_home(), get_run_logger()
    settle(log)
    options = RetrainOptions(recipe=Path(recipe), sets=sets or [], promote=promote)
    with refusals_logged():
        if notify:
            notification_block(notify)
        with turn(home, options, log.info) as ours:
            outcome = _in_turn(options, home, log.info) if ours else RetrainOutcome("skipped", [WAITS])
    for line in outcome.sentences:
        log.info("%s", line)
    skipped = outcome.word == "skipped"
    if notify and (notify_skipped or not skipped):
        deliver(notify, f"Quench retrain of {recipe}: {outcome.word}", _message(outcome), return_state=True)
    flush_log()
    message = " ".join(outcome.sentences[:3])
    return Completed(message=message, data=str(outcome.run or ""), name="Skipped" if skipped else "Completed")


WAITS = (
    "A retrain of this recipe is under way and another one waits for its end: that one will see the data as it is then."
)


@contextlib.contextmanager
def turn(home: Path, options: RetrainOptions, say: Say) -> Generator[bool]:
    """Hold the recipe's turn; False where one retrain has it and another waits for it already.

    One that waits is needed: rows may have come since the first one looked. A second would see what the first one sees.
    """
    locks, name = home / "locks", f"retrain-{fingerprint(options.series)[:12]}"
    locks.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with locked_now(locks / f"{name}-next.lock") as ours:
            if ours:
                waits = "waiting: a retrain of this recipe is under way"
                held.enter_context(flocked(locks / f"{name}.lock", waits=lambda: say(waits)))
        yield ours


def _in_turn(options: RetrainOptions, home: Path, say: Say) -> RetrainOutcome:
    late = skip_late()
    for line in late:
        say(line)
    outcome = retrained(options, home, say)
    return outcome._replace(sentences=[*outcome.sentences, *late])


def retrained(options: RetrainOptions, home: Path, say: Say) -> RetrainOutcome:
    """Compare with what the last retrain saw; where anything changed, run the pipeline, decide, and put it on record.

    Raises:
        RecipeError: Bad input.
        RunFailed: A step failed.
        StepFailed: The champion could not be evaluated.
    """
    loaded = load_and_read(options.recipe, sets=options.sets, data=False).loaded
    pins = pin(loaded, home)
    saw = seen(loaded, pins, options)
    before = last(home, options)
    if before and before.saw == saw:
        return RetrainOutcome("skipped", [f"Nothing changed since run {before.run.name}: rows, recipe, packages."])
    rows = rows_of(fetched(loaded, pins).origins.values(), loaded.recipe.data)
    changes = count(before.rows, rows) if before else None
    reasons = why(before, saw, changes)
    if before and not reasons:
        return RetrainOutcome(
            "skipped", [f"The data's files changed since run {before.run.name}, none of their rows did."]
        )
    for reason in reasons:
        say(reason)
    # It pins later than the rows were read: nothing is missed.
    validated = validate(options.recipe, sets=options.sets, home=home)
    run = Path(run_validated(validated, only=[], because=reasons))
    ending = _decided(run, home, say) if options.promote else _undecided(run)
    record = {
        "schema": 1,
        **options.series,
        "number": before.number + 1 if before else 1,
        "flow_run": flow_run.id,
        "before": before.run.name if before else None,
        "reasons": reasons,
        "changes": asdict(changes) if changes else None,
        "saw": saw,
        "outcome": ending.word,
        "told": ending.sentences,
        "decision": ending.decision,
    }
    save(rows, run / ROWS_SEEN)
    write_json(run / RECORD, record)  # last: from now on it counts as seen
    create_markdown_artifact(_markdown(record, run), key="retrain", description="what changed and what came of it")
    return RetrainOutcome(ending.word, [*ending.sentences, *reasons], run)


def last(home: Path, options: RetrainOptions) -> Before | None:
    """The last retrain of this recipe that ended with a decision, as long as the folder of its run is there.

    By its number: names of runs begin by a time, and clocks jump.
    """
    records = [(path.parent, read_json(path)) for path in run_files(home, RECORD)]
    series = [
        Before(run, record["number"], record["saw"])
        for run, record in records
        if {name: record[name] for name in options.series} == options.series
    ]
    return max(series, key=lambda before: before.number, default=None)


def seen(loaded: Loaded, pins: Pins, options: RetrainOptions) -> dict[str, Any]:
    """Everything that shapes what a retrain makes and decides: digests of the data, the rest by name."""
    steps: list[Step] = []
    compose(loaded.recipe, pins, steps.append)
    single = (pins.base, pins.tokenizer, pins.general, pins.template, pins.adapter, pins.calibration_text)
    inputs = [source for source in (*single, *pins.scorers.values(), *pins.externals.values()) if source]
    return canonical(
        {
            "data": [source.digest for source in pins.data],
            "recipe": loaded.recipe.model_dump(mode="json", exclude={"run"}),
            "inputs": {source.name: source.digest for source in inputs},
            "versions": {f"step {step.stage}": step.version for step in steps}
            | {name: version for step in steps for name, version in step.identity["tools"].items()},
            "promote": options.promote,
        }
    )


def why(before: Before | None, saw: Mapping[str, Any], changes: Changes | None) -> list[str]:
    """Reasons to train, as sentences; none where only the bytes of the data's files are others."""
    if before is None:
        return ["First retrain of this recipe."]
    reasons = [f"Since run {before.run.name}: {changes}."] if changes else []
    for part, name in (("recipe", "Recipe"), ("inputs", "Inputs"), ("versions", "Packages and steps")):
        old, new = before.saw[part], saw[part]
        if part == "versions":  # a step more or less is the recipe's doing
            both = old.keys() & new.keys()
            old, new = ({key: versions[key] for key in both} for versions in (old, new))
        if fields := difference(old, new):
            more = f", and {len(fields) - NAMED} more" if len(fields) > NAMED else ""
            reasons.append(f"{name}: {', '.join(fields[:NAMED])}{more}.")
    if before.saw["promote"] != saw["promote"]:
        reasons.append("It is to promote." if saw["promote"] else "It is not to promote any more.")
    return reasons


class _Ending(NamedTuple):
    word: str
    sentences: list[str]
    decision: dict[str, Any] | None


WORDS = {"promoted": "promoted", "blocked": "not promoted", "nothing": "nothing to promote", "none": "not promoted"}


def _decided(run: Path, home: Path, say: Say) -> _Ending:
    """The candidate through the gate, as `quench promote` does it."""
    decision = promotion.promote(run, home, say=say)
    for line in decision.trouble:
        say(f"MLflow is behind promotions.jsonl: {line}")
    record = {"event": decision.event, "promotion": decision.promotion and asdict(decision.promotion)}
    return _Ending(WORDS[decision.event], [line.strip() for line in promotion.sentences(decision)], record)


def _undecided(run: Path) -> _Ending:
    gate = read_json(run / "report.json")["gate"]["text"]
    return _Ending("trained", ["Trained; promotion was not asked for.", *gate], None)


def _message(outcome: RetrainOutcome) -> str:
    places = [f"Report: {outcome.run / 'report.html'}"] if outcome.run else []
    places += [f"Prefect: {flow_run.ui_url}"] if flow_run.ui_url else []
    return "\n".join([*outcome.sentences, *places])


def _markdown(record: Mapping[str, Any], run: Path) -> str:
    record = in_lines(record)
    lines = [f"# Retrain: {record['outcome']}", "", *(f"- {line}" for line in (*record["told"], *record["reasons"]))]
    if changes := record["changes"]:
        domains = sorted({domain for counts in changes.values() for domain in counts})
        lines += ["", "| domain | added | removed | edited |", "| --- | ---: | ---: | ---: |"]
        for domain in domains:
            figures = (f"{changes[kind].get(domain, 0):,}" for kind in ("added", "removed", "edited"))
            lines.append(f"| {escaped(domain) or '–'} | {' | '.join(figures)} |")
    return inert("\n".join([*lines, "", f"Run `{run.name}`, its report: {(run / 'report.html').as_uri()}"])) + "\n"
