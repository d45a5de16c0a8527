"""Names one of the candidates. Where there are several, by their loss on dev and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.stats import t

from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

SCORES = "_scores"
COMPUTED = "computed.json"  # tasks/jobs/loading/computing.py writes it; torch is not loaded here
PREFERRED = "dequantized"  # the weights that a QLoRA adapter was trained on
OTHER = "original"
RULE = (
    "the lower mean loss over the completion tokens of dev, where the paired 95 % interval over groups leaves out "
    "zero; the dequantized base otherwise"
)


def run(job: Job) -> dict[str, Any]:
    """Name the only candidate, or the better of the two merges.

    Reads:
        One input per candidate. Where there are two, scores.parquet of NAME_scores for each: its nll rows of dev; and
        computed.json: the device that it was scored on.
    Writes:
        choice.json {"candidate": name of the input}; where it was decided here, with the figures and the rule; with
        `undecided` and the rule where the two were scored on different devices.
    Metrics:
        None.

    Raises:
        StageError: The two were not scored on the same rows of dev, or a loss is not a number.
    """
    candidates = [name for name in job.inputs if not name.endswith(SCORES)]
    choice: dict[str, Any] = {"candidate": candidates[0]}
    if len(candidates) == 1:
        job.events.note("choice", f"{candidates[0]}: named by the recipe (merge.base)")
    elif (why := _other_devices(job)) is not None:
        choice = {"candidate": PREFERRED, "rule": RULE, "undecided": why}
        job.events.note("choice", f"{PREFERRED}: undecided, {why}; rule: {RULE}")
    else:
        choice = _decided(job)
        interval = "[{:+.6f}, {:+.6f}]".format(*choice["ci95"]) if choice["ci95"] else "(one group: no interval)"
        job.events.note(
            "choice",
            f"{choice['candidate']}: dev loss {choice['loss'][PREFERRED]:.6f} ({PREFERRED}) against "
            f"{choice['loss'][OTHER]:.6f} ({OTHER}), difference {choice['difference']:+.6f} {interval} "
            f"nats a token, {choice['tokens']} tokens in {choice['groups']} groups; rule: {RULE}",
        )
    (job.out / "choice.json").write_text(json.dumps(choice) + "\n", encoding="utf-8")
    return choice


def _other_devices(job: Job) -> str | None:
    """Why the two cannot be compared, where they were scored on different kinds of devices: noise would decide."""
    devices = {name: _device(job.inputs[f"{name}{SCORES}"].path) for name in (PREFERRED, OTHER)}
    if len({device for device in devices.values() if device is not None}) < 2:
        return None
    where = " and ".join(f"merged-{name} on {device}" for name, device in devices.items())
    return f"scored on different devices, {where}: a difference in loss may be the devices'"


def _device(folder: Path) -> str | None:
    path = folder / COMPUTED
    return json.loads(path.read_text(encoding="utf-8"))["device"] if path.exists() else None


def _decided(job: Job) -> dict[str, Any]:
    ours, theirs = (_dev_losses(job.inputs[f"{name}{SCORES}"].path) for name in (PREFERRED, OTHER))
    if ours.select(["row", "group", "n"]) != theirs.select(["row", "group", "n"]):
        raise _undecidable(
            "the two merged models were not scored on the same rows of dev", "a paired comparison needs them"
        )
    losses = {name: _mean(table) for name, table in ((PREFERRED, ours), (OTHER, theirs))}
    if not np.isfinite(list(losses.values())).all():
        raise _undecidable("a loss on dev is not a number", f"mean losses: {losses}")
    comparison = paired(_grouped(ours), _grouped(theirs))
    return {
        "candidate": OTHER if comparison.ci95 is not None and comparison.ci95[0] > 0 else PREFERRED,
        "rule": RULE,
        "loss": losses,
        "difference": comparison.difference,
        "ci95": comparison.ci95 and list(comparison.ci95),
        "rows": ours.num_rows,
        "groups": comparison.groups,
        "tokens": int(ours["n"].to_numpy().sum()),
    }


def _dev_losses(folder: Path) -> pa.Table:
    """row, group, sum (nats), n (tokens) of dev, sorted by row. Rows of test are left out while reading."""
    return pq.read_table(
        folder / "scores.parquet",
        columns=["row", "group", "sum", "n"],
        filters=[("metric", "==", "nll"), ("split", "==", "dev")],
    ).sort_by("row")


def _mean(table: pa.Table) -> float:
    return float(table["sum"].to_numpy().sum() / table["n"].to_numpy().sum())


class Grouped(NamedTuple):
    """Sums within groups, in the order of the groups' names.

    Attributes:
        total: [groups] loss in nats.
        tokens: [groups].
    """

    total: NDArray[np.float64]
    tokens: NDArray[np.float64]


def _grouped(table: pa.Table) -> Grouped:
    sums = table.group_by("group", use_threads=False).aggregate([("sum", "sum"), ("n", "sum")]).sort_by("group")
    return Grouped(sums["sum_sum"].to_numpy(), sums["n_sum"].to_numpy().astype(np.float64))


class PairedDifference(NamedTuple):
    """Difference of two mean losses (nats per token) with its 95 % interval; None where there is only one group."""

    difference: float
    ci95: tuple[float, float] | None
    groups: int


def paired(ours: Grouped, theirs: Grouped) -> PairedDifference:
    """Mean loss of ours - theirs, with Student's t over groups.

    The mean is a ratio of sums, so a group's influence on it is its excess over the mean, linearised: (difference of
    its sums - difference of means * its tokens) / tokens per group. docs/adr says why this and no bootstrap.
    """
    differences, tokens = ours.total - theirs.total, ours.tokens
    groups, difference = len(tokens), float(differences.sum() / tokens.sum())
    if groups < 2:
        return PairedDifference(difference, None, groups)
    influence = (differences - difference * tokens) / tokens.mean()
    half = float(t.ppf(0.975, groups - 1) * influence.std(ddof=1) / np.sqrt(groups))
    return PairedDifference(difference, (difference - half, difference + half), groups)


def _undecidable(what: str, why: str) -> StageError:
    return StageError.of(what=what, where="dev", why=why, next="run again with merge.base: dequantized (or original)")
