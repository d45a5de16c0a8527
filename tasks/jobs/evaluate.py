"""One arm, loaded from the store, over dev, test and the general hold-out: one score per row and metric."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from recipes.arms import NOT_DECODED
from tasks.jobs.loading.computing import computed, refuse_other_device
from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import load_arm, setup
from tasks.jobs.measuring.answers import Answer
from tasks.jobs.measuring.decoding import Decoder, greedy_config
from tasks.jobs.measuring.grading import Prompting, grade, open_graders, refuse_references, run_harnesses
from tasks.jobs.measuring.kv_cache import KVCache, calibrated
from tasks.jobs.measuring.own_tokenizer import OwnReading, own_reading
from tasks.jobs.measuring.progress import Progress
from tasks.jobs.measuring.scores import SCORES, means, score_line
from tasks.jobs.measuring.teacher_forcing import (
    Kept,
    Stretch,
    TokenRow,
    batches,
    completion_bytes,
    forced,
    read_general,
    read_rows,
)
from tasks.jobs.measuring.tiles import WHOLE, Model, computes_in_tiles, read_in_rows
from tasks.jobs.text.tokenizer import load_tokenizer
from tasks.runtime.process.job import Job

TOKENS = pa.schema([(name, pa.string()) for name in ("row", "group", "split")] + [("kl", pa.float32())])
ANSWERS = pa.schema(
    [(name, pa.string()) for name in ("row", "split", "domain", "prompt", "reference", "answer")]
    + [("ending", pa.string()), ("score", pa.float64()), ("error", pa.string()), ("scores", pa.string())]
)
HELD_OUT = ("dev", "test")
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
        lm-eval tasks are rows of their own), truncated (1 where the answer has no end, and so scores 0; n = 1).
        kl.parquet: KL per token. answers.parquet: prompt, reference and answer, its `ending` (finished, cut, or
        thinking that never ends), with `score` and `error` of the first scorer and `scores`, JSON {NAME: {score,
        error}} of all. Rows without a prompt (plain texts) have no task and no answer, and neither have rows of a split
        that params.decoded, where it is given, leaves out. kv_cache.json: how a quantized KV cache was simulated
        (params.kv). computed.json: device, attention, threads and batch size; also in the result.
        Without a reference there is no kl and no agree; a model with another tokenizer has only bits and task scores.
        `absent` of the result says why, by metric, or METRIC/dev where that split alone has none.
    Metrics:
        The mean of each, by split. `problems` of the result: metric -> why the arm has no score of it.

    Raises:
        StageError: Logits are inf or NaN; a scorer cannot be loaded or rejects a reference answer; the model has no KV
            cache; an external model cannot read the rows; the device is of another kind than planned.
    """
    refuse_other_device(job)
    setup(job)
    if job.execution.device == "cpu":
        os.environ["GPTQ_TORCH_CACHE_WEIGHTS"] = "1"  # 2- and 3-bit layers dequantize once, not in every forward
    dataset = job.inputs["dataset"].path
    rows, general = read_rows(dataset, *HELD_OUT), read_general(dataset)
    prompted = _with_prompt(rows, job)
    asked = _asked(prompted, job)
    graders = open_graders(job)
    prompting = Prompting.of(dataset / "tokenizer")
    refuse_references(prompted, graders.answers, prompting)
    own = _own_reading(rows, job)
    prompting = Prompting(own.tokenizer, own.ends) if own else prompting
    arm = _load(job, passes=[*([own.rows] if own else [rows, general]), *_by_split(asked)])
    scores, tokens, absent = _own_scores(arm, own, rows) if own else _forced_scores(arm, rows)
    if not own:
        scores += _general_scores(arm, general)
    answered = _answers(arm, asked, own=own, prompting=prompting)
    graded = grade(asked, [one.answer for one in answered], graders.answers)
    scores += [score_line(row, metric, value, 1) for metric, values in graded.scores.items() for row, value in values]
    scores += [score_line(row, "truncated", one.answer.truncated, 1) for row, one in zip(asked, answered, strict=True)]
    undecoded = {row.split for row in prompted} - {row.split for row in asked}
    of_answers = ("truncated", *(grader.metric for grader in graders.answers))
    absent |= {f"{metric}/{split}": NOT_DECODED for split in undecoded for metric in of_answers}
    answers = [one.line | verdicts for one, verdicts in zip(answered, graded.verdicts, strict=True)]
    documents, problems = run_harnesses(arm.model, graders.harnesses, job, prompting=prompting, caches=arm.caches)
    scores += documents
    for name, lines, schema in (("scores", scores, SCORES), ("kl", tokens, TOKENS), ("answers", answers, ANSWERS)):
        pq.write_table(pa.Table.from_pylist(lines, schema=schema), job.out / f"{name}.parquet")
    problems = {metric: problem.as_dict() for metric, problem in (graded.problems | problems).items()}
    gaps = {name: reasons for name, reasons in (("absent", absent), ("problems", problems)) if reasons}
    return {**computed(arm.model, job), **gaps, **_record_kv_cache(arm), **_means(scores, job)}


def _with_prompt(rows: list[TokenRow], job: Job) -> list[TokenRow]:
    """The rows that a model is asked: one sample per conversation, no plain texts."""
    prompted = [row for row in rows if row.prompt_ids]
    if len(prompted) < len(rows):
        job.events.note(
            "task", f"{len(rows) - len(prompted)} of {len(rows)} rows are plain text: no prompt, so no task score"
        )
    return prompted


def _asked(prompted: list[TokenRow], job: Job) -> list[TokenRow]:
    """Those to which answers are decoded: all, or those of test where nothing chooses by this arm's answers to dev."""
    asked = [row for row in prompted if row.split in job.params.get("decoded", HELD_OUT)]
    if left := len(prompted) - len(asked):
        job.events.note("answers", f"to {len(asked)} rows of test; to {left} of dev {NOT_DECODED}")
    return asked


def _by_split(rows: Sequence[TokenRow]) -> list[list[TokenRow]]:
    """Rows of dev, rows of test: the batches of either are the same, whether the other one is decoded or not."""
    return [[row for row in rows if row.split == split] for split in HELD_OUT]


def _own_reading(rows: list[TokenRow], job: Job) -> OwnReading | None:
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


class _LoadedArm(NamedTuple):
    """The arm in memory, the dataset's tokenizer, and what makes the arm's KV caches where they are quantized."""

    job: Job
    model: Model
    tokenizer: Any
    caches: KVCache | None
    progress: Progress

    def forced(
        self, rows: list[TokenRow], note: str, *, keep: Callable[[Stretch], Kept], caches: KVCache | None = None
    ) -> Iterator[tuple[TokenRow, list[Kept]]]:
        """Teacher forcing over all rows, batch by batch; what `keep` made of each row's stretches."""
        for batch in self.batches(rows, key=lambda row: len(row.ids)):
            yield from zip(batch, forced(self.model, batch, keep, caches), strict=True)
            self.progress.step(note)

    def batches(self, rows: list[TokenRow], *, key: Callable[[TokenRow], int]) -> list[list[TokenRow]]:
        """The rows in batches of the job's size."""
        return batches(rows, self.job.params["batch_size"], key=key)


def _load(job: Job, *, passes: Sequence[Sequence[TokenRow]]) -> _LoadedArm:
    """Load the arm; `passes` are the rows of each pass over it, for its progress."""
    model = load_arm(
        job.params["kind"],
        job.inputs["model"].path,
        adapter=job.optional("adapter"),
        device=job.execution.device,
        trusted=job.params.get("trust_remote_code", False),
        attention=job.params.get("attention"),
        note=job.events.note,
    )
    job.events.note("kernel", f"{kernel_of(model)} on {job.execution.device}")
    read_in_rows(model)
    if not computes_in_tiles(model):
        job.events.note("logits", WHOLE)
    tokenizer = load_tokenizer(job.inputs["dataset"].path / "tokenizer")
    total = sum(-(-len(rows) // job.params["batch_size"]) for rows in passes)
    return _LoadedArm(job, model, tokenizer, _kv_cache(model, job), Progress(job.events, total, unit="batch"))


def _kv_cache(model: Model, job: Job) -> KVCache | None:
    """What params.kv asks for; `fp8-calibrated` runs over the calibration set first."""
    kind = job.params.get("kv")
    if kind is None:
        return None
    scales = calibrated(model, job.inputs["calibset"].path) if kind == "fp8-calibrated" else {}
    return KVCache(config=model.config, kind=kind, scales=scales)


def _record_kv_cache(arm: _LoadedArm) -> dict[str, Any]:
    """Write to kv_cache.json, a note and the manifest how the KV cache was stored."""
    if arm.caches is None:
        return {}
    record = arm.caches.record()
    (arm.job.out / "kv_cache.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    arm.job.events.note("kv cache", arm.caches.note)
    return {"kv_cache": {"kind": record["kind"], "label": record["label"], "layers": len(record["layers"])}}


class _Scored(NamedTuple):
    """Lines of scores.parquet and of kl.parquet; and why a metric has none."""

    scores: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    absent: dict[str, str]


class _Losses(NamedTuple):
    """What stays of a stretch of a row: -log p [m] in nats, and which of them count [k]."""

    every: Tensor
    counted: Tensor

    @classmethod
    def of(cls, stretch: Stretch) -> _Losses:
        """Of its tokens."""
        losses = stretch.losses()
        return cls(losses, losses[stretch.counted])


def _sums(stretches: Sequence[_Losses]) -> tuple[float, float]:
    """Sums over a row: of all its tokens, and of those that count."""
    every, counted = (torch.cat(losses).sum().item() for losses in zip(*stretches, strict=True))
    return every, counted


def _own_scores(arm: _LoadedArm, own: OwnReading, rows: list[TokenRow]) -> _Scored:
    """Bits of every row's completions in the model's own tokens, per byte of the same text as for every other arm."""
    nll = dict.fromkeys((row.row for row in rows), 0.0)
    for row, losses in arm.forced(own.rows, "completions", keep=_Losses.of):
        nll[row.row] += _sums(losses)[1]
    sizes = {row.row: completion_bytes(row, arm.tokenizer) for row in rows}
    scores = [score_line(row, "bits", nll[row.row] / math.log(2), sizes[row.row]) for row in rows if sizes[row.row]]
    return _Scored(scores, [], dict.fromkeys(("nll", "nll_all", "nll_general", "kl", "agree"), own.why))


def _forced_scores(arm: _LoadedArm, rows: list[TokenRow]) -> _Scored:
    """Loss of every row; KL and agreement of the rows that the reference holds."""
    folder = arm.job.optional("reference")
    reference = _Reference(folder, tokens=len(arm.tokenizer)) if folder else None
    scored = _Scored([], [], dict.fromkeys(("kl", "agree"), NO_REFERENCE) if reference is None else {})

    def keep(stretch: Stretch) -> tuple[_Losses, _Compared | None]:
        return _Losses.of(stretch), reference.compared(stretch) if reference else None

    for row, kept in arm.forced(rows, "completions", keep=keep, caches=arm.caches):
        losses, compared = zip(*kept, strict=True)
        scored.scores.extend(_loss_scores(row, losses, arm.tokenizer))
        if compared[0] is None:
            continue
        kl = torch.cat([stretch.kl for stretch in compared])
        scored.scores.append(score_line(row, "kl", kl.sum().item(), row.n))
        scored.scores.append(score_line(row, "agree", sum(stretch.agree for stretch in compared), row.n))
        place = {"row": row.row, "group": row.group, "split": row.split}
        scored.tokens.extend({**place, "kl": value} for value in kl.tolist())
    if reference and reference.too_narrow:
        scored.absent.update(dict.fromkeys(("kl", "agree"), reference.too_narrow))
    return scored


def _loss_scores(row: TokenRow, losses: Sequence[_Losses], tokenizer: Any) -> list[dict[str, Any]]:
    """nll, nll_all and bits of a row; no bits for completions without any text."""
    every, nll = _sums(losses)
    n_bytes = completion_bytes(row, tokenizer)
    scores = [score_line(row, "nll", nll, row.n), score_line(row, "nll_all", every, len(row.ids) - 1)]
    return [*scores, score_line(row, "bits", nll / math.log(2), n_bytes)] if n_bytes else scores


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || arm) per token in nats, sum_v p_v (log p_v - log q_v). Both [n, vocabulary] -> [n].

    In fp64: fp32 is off by up to 1e-6 nats per token, and a faithful merge costs 1e-5.
    """
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class _Compared(NamedTuple):
    """Of the counted tokens of a stretch: KL [k] in nats, and how often both name the same token first."""

    kl: Tensor
    agree: int


class _Reference:
    """Stored logits of the reference by row.

    Attributes:
        too_narrow: Why there is nothing to compare with the model; empty as long as there is.
    """

    def __init__(self, folder: Path, *, tokens: int) -> None:
        places = pq.read_table(folder / "reference.parquet").to_pylist()
        self._starts = {place["row"]: place["start"] for place in places}
        self._logits = safe_open(folder / "reference.safetensors", framework="pt").get_slice("logits")
        self._tokens = tokens
        self.too_narrow = ""

    def compared(self, stretch: Stretch) -> _Compared | None:
        """KL(reference || arm) and agreement, or None where the row was not sampled or the widths do not allow it.

        Compared are the columns that both have: models of one tokenizer pad the vocabulary differently, with tokens
        that never come.
        """
        start = self._starts.get(stretch.row.row)
        if start is None:
            return None
        width = min(self._logits.get_shape()[-1], stretch.every.shape[-1])
        if width < self._tokens:
            self.too_narrow = f"{width:,} logits, fewer than the {self._tokens:,} tokens of the vocabulary"
            return None
        kl, agree, first = [stretch.every.new_zeros(0, dtype=torch.float64)], 0, start + stretch.before
        for places in stretch.counted.split(stretch.part):
            expected = self._logits[first : first + len(places)].to(stretch.every.device)[:, :width]
            logits = stretch.every[places][:, :width]
            kl.append(divergence(expected, logits))
            # max: argmax of bf16 takes 4 times as long
            agree += int((expected.max(-1).indices == logits.max(-1).indices).sum().item())
            first += len(places)
        return _Compared(torch.cat(kl), agree)


def _general_scores(arm: _LoadedArm, rows: list[TokenRow]) -> list[dict[str, Any]]:
    return [
        score_line(row, "nll_general", _sums(losses)[0], row.n)
        for row, losses in arm.forced(rows, "general text", keep=_Losses.of, caches=arm.caches)
    ]


class _Answered(NamedTuple):
    """An answer, and its line of answers.parquet but for the verdicts."""

    answer: Answer
    line: dict[str, Any]


def _answers(arm: _LoadedArm, rows: list[TokenRow], *, own: OwnReading | None, prompting: Prompting) -> list[_Answered]:
    """Greedy answers, decoded once for all scorers, in the order of `rows`; to the prompts of `own` where given."""
    if not rows:
        return []
    reader, prompts, longest = prompting.reader(), rows, arm.job.params["max_new_tokens"]
    if own:
        asked, longest = {row.row for row in rows}, _own_longest(own.prompts, prompting, arm.job)
        prompts = [row for row in own.prompts if row.row in asked]
        config = own.greedy(max_new_tokens=longest)
    else:
        config = greedy_config(arm.job.inputs["dataset"].path / "tokenizer", max_new_tokens=longest)
    answered: dict[str, _Answered] = {}
    decoder = Decoder(model=arm.model, config=config, size=arm.job.params["batch_size"], caches=arm.caches)
    for of_split in _by_split(prompts):
        note, begun = arm.job.events.note, lambda: arm.progress.step("answers")
        for row, decoded in decoder.answers(of_split, begun=begun, note=note):
            answer = reader.read(row, decoded)
            line = {
                "row": row.row,
                "split": row.split,
                "domain": row.domain,
                "prompt": reader.tokenizer.decode(row.prompt_ids),
                "reference": row.answer,
                "answer": answer.text,
                "ending": answer.ending,
            }
            answered[row.row] = _Answered(answer, line)
    return [answered[row.row] for row in rows]


def _own_longest(prompts: list[TokenRow], prompting: Prompting, job: Job) -> int:
    """The limit of the recipe, which was made for the base's tokens; in other tokens a reference may need more."""
    limit = job.params["max_new_tokens"]
    needed = max(map(prompting.reference_size, prompts))
    if needed > limit:
        job.events.note("longest answer", f"{needed} of its own tokens, as the longest reference has, and not {limit}")
    return max(limit, needed)


def _means(scores: list[dict[str, Any]], job: Job) -> dict[str, float]:
    """Mean of each metric by split; also written as metric events."""
    by_name = means(scores)
    for name, value in by_name.items():
        job.events.metric(name, value)
    return by_name
