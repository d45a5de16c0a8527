"""One arm, loaded from what was stored, over dev, test and the general hold-out: a score a row and metric."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from torch import Tensor

from tasks.jobs.loading.load import kernel_of, load_arm, setup
from tasks.jobs.measuring.grading import Asking, ask_harnesses, grade, open_graders, open_tokenizer, refuse_references
from tasks.jobs.measuring.kv_cache import KVCache, calibrated
from tasks.jobs.measuring.own_tokenizer import OwnReading, own_reading
from tasks.jobs.measuring.teacher_forcing import (
    Model,
    Predicted,
    Row,
    answers,
    batches,
    completion_bytes,
    forced,
    greedy_config,
    read_general,
    read_rows,
)
from tasks.runtime.process.job import Job

SCORES = pa.schema(
    [(name, pa.string()) for name in ("row", "group", "split", "domain", "metric")]
    + [("sum", pa.float64()), ("n", pa.int64())]
)
TOKENS = pa.schema([(name, pa.string()) for name in ("row", "group", "split")] + [("kl", pa.float32())])
ANSWERS = pa.schema(
    [(name, pa.string()) for name in ("row", "split", "domain", "prompt", "reference", "answer")]
    + [("score", pa.float64()), ("error", pa.string()), ("scores", pa.string())]
)
NO_REFERENCE = "no reference: nothing was trained in this run, and evaluate.reference names no model"


def run(job: Job) -> dict[str, Any]:
    """Score an arm.

    Reads:
        model: folder. adapter: PEFT folder (optional). dataset. reference (optional). scorer-N: what entry N of the
        scorers reads. calibset (params.kv is fp8-calibrated).
    Writes:
        scores.parquet: row, group, split, domain, metric, sum, n. Metrics: nll (nats, n completion tokens), nll_all
        (nats, n all tokens of the row but the first), nll_general (the same of the hold-out), bits (nll in bits, n
        UTF-8 bytes of the completions' text), kl (KL(reference || arm) in nats, n completion tokens), agree (top-1
        agreements, n completion tokens), task (the first scorer's score, n = 1), task.NAME (another one's; documents of
        lm-eval tasks are rows of their own).
        kl.parquet: KL a token. answers.parquet: what was asked, expected and answered, with `score` and `error` of the
        first scorer and `scores`, JSON {NAME: {score, error}} of all. Rows without a prompt (plain texts) have no task
        and no answer. kv_cache.json: how a quantized KV cache was simulated (params.kv).
        Without a reference there is no kl and no agree; a model with another tokenizer has bits and task scores alone.
        `absent` of the result says why, by metric.
    Metrics:
        The mean of each, by split. `problems` of the result: metric -> why the arm has no score of it.

    Raises:
        StageError: Logits are inf or NaN; a scorer cannot be loaded or rejects a reference answer; the model has no KV
            cache; an external model cannot read the rows.
    """
    setup(job)
    if job.execution.device == "cpu":
        os.environ["GPTQ_TORCH_CACHE_WEIGHTS"] = "1"  # 2- and 3-bit layers dequantize once, not in every forward
    params, dataset = job.params, job.inputs["dataset"].path
    rows, general = read_rows(dataset, "dev", "test"), read_general(dataset)
    asked = [row for row in rows if row.prompt_ids]  # one sample a conversation
    if len(asked) < len(rows):
        job.events.note(
            "task", f"{len(rows) - len(asked)} of {len(rows)} rows are plain text: no prompt, so no task score"
        )
    graders = open_graders(job)
    refuse_references(asked, graders.answers)
    adapter = job.inputs["adapter"].path if "adapter" in job.inputs else None
    own = _own_reading(rows, job)
    trusted = params.get("trust_remote_code", False)
    model = load_arm(
        params["kind"],
        job.inputs["model"].path,
        adapter=adapter,
        device=job.execution.device,
        trusted=trusted,
        note=job.events.note,
    )
    job.events.note("kernel", f"{kernel_of(model)} on {job.execution.device}")
    arm = _Loaded(model, open_tokenizer(dataset / "tokenizer"), _kv_cache(model, job))
    progress = _Progress(job, [own.rows, asked] if own else [rows, asked, general])
    if own:
        scores, tokens, absent = _own_scores(arm, own, rows, job, progress)
    else:
        scores, tokens, absent = _forced_scores(arm, rows, job, progress)
        scores += _general_scores(arm, general, job, progress)
    answered = _answers(arm, asked, job, progress, own=own)
    graded = grade(asked, [one["answer"] for one in answered], graders.answers)
    scores += [_score(row, metric, value, 1) for metric, values in graded.scores.items() for row, value in values]
    answered = [one | said for one, said in zip(answered, graded.said, strict=True)]
    asking = Asking(own.tokenizer, own.ends) if own else Asking.of(dataset / "tokenizer")
    documents, problems = ask_harnesses(model, graders.harnesses, job, asking=asking, caches=arm.caches)
    scores += documents
    for name, lines, schema in (("scores", scores, SCORES), ("kl", tokens, TOKENS), ("answers", answered, ANSWERS)):
        pq.write_table(pa.Table.from_pylist(lines, schema=schema), job.out / f"{name}.parquet")
    problems = {metric: problem.as_dict() for metric, problem in (graded.problems | problems).items()}
    said = {"absent": absent, "problems": problems}
    given = {name: one for name, one in said.items() if one}
    return {"kernel": kernel_of(model), **given, **_stored(arm.caches, job), **_means(scores, job)}


def _own_reading(rows: list[Row], job: Job) -> OwnReading | None:
    """The rows as an external model with another tokenizer reads them; None for every other arm."""
    if job.params["kind"] != "external":
        return None
    model, dataset = job.inputs["model"].path, job.inputs["dataset"].path
    trusted = job.params.get("trust_remote_code", False)
    own = own_reading(model, dataset, rows, chat_template=job.params.get("chat_template"), trusted=trusted)
    if own is not None:
        job.events.note("tokenizer", f"{own.why}: scored by bits a byte and by its answers, in its own tokens")
        if job.params.get("chat_template"):
            job.events.note("chat template", "it has none of its own: ChatML, as evaluate.external says")
    return own


class _Loaded(NamedTuple):
    """The arm, the dataset's tokenizer, and what makes the arm's KV caches where they are quantized."""

    model: Model
    tokenizer: Any
    caches: KVCache | None


def _kv_cache(model: Model, job: Job) -> KVCache | None:
    """What params.kv asks for; `fp8-calibrated` runs over the calibration set first."""
    kind = job.params.get("kv")
    if kind is None:
        return None
    scales = calibrated(model, job.inputs["calibset"].path) if kind == "fp8-calibrated" else {}
    return KVCache(config=model.config, kind=kind, scales=scales)


def _stored(caches: KVCache | None, job: Job) -> dict[str, Any]:
    """Record how the KV cache was stored, in kv_cache.json, a note and the manifest."""
    if caches is None:
        return {}
    record = caches.record()
    (job.out / "kv_cache.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    job.events.note("kv cache", caches.note)
    return {"kv_cache": {"kind": record["kind"], "label": record["label"], "layers": len(record["layers"])}}


class _Progress:
    def __init__(self, job: Job, passes: Sequence[Sequence[Row]]) -> None:
        self._events, self._done = job.events, 0
        self._total = sum(-(-len(rows) // job.params["batch_size"]) for rows in passes)

    def step(self, note: str) -> None:
        self._done += 1
        self._events.progress(self._done, self._total, unit="batch", note=note)


def _score(row: Row, metric: str, value: float, n: int) -> dict[str, Any]:
    return {
        "row": row.row,
        "group": row.group,
        "split": row.split,
        "domain": row.domain,
        "metric": metric,
        "sum": value,
        "n": n,
    }


class _Forced(NamedTuple):
    """Lines of scores.parquet and of kl.parquet; and why a metric has none."""

    scores: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    absent: dict[str, str]


def _own_scores(arm: _Loaded, own: OwnReading, rows: list[Row], job: Job, progress: _Progress) -> _Forced:
    """Bits of every row's completions in the model's own tokens, over the bytes that every other arm's stand over."""
    nll = dict.fromkeys((row.row for row in rows), 0.0)
    for group in batches(own.rows, job.params["batch_size"], key=lambda row: len(row.ids)):
        for one in forced(arm.model, group):
            nll[one.row.row] += one.losses()[one.counted].sum().item()
        progress.step("completions")
    sizes = {row.row: completion_bytes(row, arm.tokenizer) for row in rows}
    scores = [_score(row, "bits", nll[row.row] / math.log(2), sizes[row.row]) for row in rows if sizes[row.row]]
    return _Forced(scores, [], dict.fromkeys(("nll", "nll_all", "nll_general", "kl", "agree"), own.why))


def _forced_scores(arm: _Loaded, rows: list[Row], job: Job, progress: _Progress) -> _Forced:
    """Loss of every row; KL and agreement of the rows that the reference holds."""
    reference = _Reference(job.inputs["reference"].path) if "reference" in job.inputs else None
    found = _Forced([], [], {} if reference else dict.fromkeys(("kl", "agree"), NO_REFERENCE))
    for group in batches(rows, job.params["batch_size"], key=lambda row: len(row.ids)):
        for one in forced(arm.model, group, arm.caches):
            row = one.row
            found.scores.extend(_losses(one, arm.tokenizer))
            wanted = reference.logits(row) if reference else None
            if wanted is None:
                continue
            wanted, logits = _shared(wanted.to(one.every.device), one.logits)
            if logits.shape[-1] < len(arm.tokenizer):
                why = f"{logits.shape[-1]:,} logits, fewer than the {len(arm.tokenizer):,} tokens of the vocabulary"
                found.absent.update(dict.fromkeys(("kl", "agree"), why))
                continue
            kl = divergence(wanted, logits)
            agree = (wanted.max(-1).indices == logits.max(-1).indices).sum().item()  # argmax of bf16: 4 times slower
            found.scores.append(_score(row, "kl", kl.sum().item(), row.n))
            found.scores.append(_score(row, "agree", agree, row.n))
            place = {"row": row.row, "group": row.group, "split": row.split}
            found.tokens.extend({**place, "kl": value} for value in kl.tolist())
        progress.step("completions")
    return found


def _losses(one: Predicted, tokenizer: Any) -> list[dict[str, Any]]:
    """nll, nll_all and bits of a row; no bits for completions without any text."""
    row, losses = one.row, one.losses()
    nll = losses[one.counted].sum().item()
    n_bytes = completion_bytes(row, tokenizer)
    found = [_score(row, "nll", nll, row.n), _score(row, "nll_all", losses.sum().item(), len(losses))]
    return [*found, _score(row, "bits", nll / math.log(2), n_bytes)] if n_bytes else found


def _shared(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that both have: models of one tokenizer pad the vocabulary differently, with tokens that never come.

    Both [n, vocabulary].
    """
    width = min(reference.shape[-1], logits.shape[-1])
    return reference[:, :width], logits[:, :width]


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || arm) a token in nats, sum_v p_v (log p_v - log q_v). Both [n, vocabulary] -> [n].

    In fp64: fp32 is off by up to 1e-6 nats a token, and a faithful merge costs 1e-5.
    """
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class _Reference:
    """Stored logits of the reference by row."""

    def __init__(self, folder: Path) -> None:
        places = pq.read_table(folder / "reference.parquet").to_pylist()
        self._places = {one["row"]: (one["start"], one["start"] + one["n"]) for one in places}
        self._logits = safe_open(folder / "reference.safetensors", framework="pt").get_slice("logits")

    def logits(self, row: Row) -> Tensor | None:
        """[n, vocabulary] of a row's completion tokens, or None where the row was not sampled."""
        if row.row not in self._places:
            return None
        start, end = self._places[row.row]
        return self._logits[start:end]


def _general_scores(arm: _Loaded, rows: list[Row], job: Job, progress: _Progress) -> list[dict[str, Any]]:
    scores = []
    for group in batches(rows, job.params["batch_size"], key=lambda row: len(row.ids)):
        for one in forced(arm.model, group, arm.caches):
            scores.append(_score(one.row, "nll_general", one.losses().sum().item(), one.row.n))
        progress.step("general text")
    return scores


def _answers(
    arm: _Loaded, rows: list[Row], job: Job, progress: _Progress, *, own: OwnReading | None
) -> list[dict[str, Any]]:
    """Greedy answers, decoded once for all scorers, in the order of `rows`; from the prompts of `own` where there are.

    Rows with answers of like length share a batch: it decodes until its last answer has ended.
    """
    words, longest = job.inputs["dataset"].path / "tokenizer", job.params["max_new_tokens"]
    config = own.greedy(max_new_tokens=longest) if own else greedy_config(words, max_new_tokens=longest)
    tokenizer = own.tokenizer if own else arm.tokenizer
    found: dict[str, dict[str, Any]] = {}
    for group in batches(own.prompts if own else rows, job.params["batch_size"], key=lambda row: row.answer_tokens):
        for row, tokens in zip(group, answers(arm.model, group, config, arm.caches), strict=True):
            found[row.row] = {
                "row": row.row,
                "split": row.split,
                "domain": row.domain,
                "prompt": tokenizer.decode(row.prompt_ids),
                "reference": row.answer,
                "answer": tokenizer.decode(tokens, skip_special_tokens=True),
            }
        progress.step("answers")
    return [found[row.row] for row in rows]


def _means(scores: list[dict[str, Any]], job: Job) -> dict[str, float]:
    """Mean of each metric by split, as `metric/split`; also written as metric events."""
    sums: dict[str, list[float]] = {}
    for one in scores:
        both = sums.setdefault(f"{one['metric']}/{one['split']}", [0.0, 0.0])
        both[0] += one["sum"]
        both[1] += one["n"]
    means = {name: total / n for name, (total, n) in sums.items() if n}
    for name, value in means.items():
        job.events.metric(name, value)
    return means
