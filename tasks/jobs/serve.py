"""One arm, served by a real engine: the same rows and prompts, asked of its server as a client would."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.checks.external import external_headers
from recipes.problem import RecipeError
from recipes.schemes.limits import GIB
from tasks.jobs.measuring.answers import Answer
from tasks.jobs.measuring.grading import Prompting, grade, open_graders
from tasks.jobs.measuring.progress import Progress
from tasks.jobs.measuring.scores import SCORES, means, score_line
from tasks.jobs.measuring.teacher_forcing import TokenRow, read_rows
from tasks.jobs.serving import onnx_genai
from tasks.jobs.serving.client import AT_ONCE, Client
from tasks.jobs.serving.speed import REQUESTS, loads, resident_gib
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job
from tasks.runtime.process.ports import free_port
from tasks.runtime.process.servers import EngineServer, engine_argv

ANSWERS = pa.schema(
    [(name, pa.string()) for name in ("row", "prompt", "reference", "own", "served")]
    + [("equal", pa.bool_()), ("ending", pa.string()), ("score", pa.float64())]
)
START_LIMIT_S = 1800  # kernels that are compiled at the first start: Marlin took 163 s on an H200
KERNEL = re.compile(r"Using (\w+Kernel|MatMulNBits)\b")  # what multiplies quantized weights, in the engine's words
MEANS = {"served_nll": "served_loss", "served_task": "served_task", "served_equal": "served_answers_equal"}


def run(job: Job) -> dict[str, Any]:
    """Start the engine on the arm's files, ask it, and end it.

    Reads:
        model: folder with serve.json. dataset. scores: the arm's evaluate artifact, whose answers are compared.
        scorer-N: what entry N of the scorers reads.
    Writes:
        scores.parquet, as evaluate's, rows of test: served_nll (nats, n completion tokens), served_task and
        served_task.NAME (n = 1), served_equal (1 where the answer is the arm's own to the letter, n = 1),
        served_truncated (1 where the answer has no end, and so scores 0; n = 1).
        answers.parquet: row, prompt, reference, own, served, equal, ending, score.
        served.json: engine, version, device, command, kernel, start_s, resident_gib, kv_cache_dtype, loads.
    Metrics:
        served_loss, served_task, served_answers_equal of test; start_s.

    Raises:
        StageError: The engine does not start, rejects the files, answers with errors, or its context is too short.
    """
    folder, dataset = job.inputs["model"].path, job.inputs["dataset"].path
    served = json.loads((folder / "serve.json").read_text(encoding="utf-8"))
    rows = read_rows(dataset, "test")
    assert job.execution.server_python is not None
    port = free_port()
    started = _onnx_server if job.params["engine"]["name"] == "onnxruntime-genai" else _vllm_server
    argv, context = started(job, served, rows, port=port)
    device = job.execution.device
    with EngineServer(argv, port=port, env=_environment(job, folder, context)) as server:
        start_s = server.wait_until_healthy(START_LIMIT_S)
        kernel = next((match[1] for line in server.lines if (match := KERNEL.search(line))), None)  # before it scrolls
        job.events.note("serving", f"{job.params['engine']['name']} answered after {start_s:.0f} s")
        client = Client(server.url, job.slug, trouble=server.trouble)
        scores, answers = _asked(job, client, rows, context=context)
        speeds = _speeds(job, client) if job.params["speed"] else []
        resident = resident_gib(server.group) if device == "cpu" else None  # a card's share is reserved
    pq.write_table(pa.Table.from_pylist(scores, schema=SCORES), job.out / "scores.parquet")
    pq.write_table(pa.Table.from_pylist(answers, schema=ANSWERS), job.out / "answers.parquet")
    engine = job.params["engine"]
    record = {
        "engine": engine["name"],
        "version": engine["version"],
        "device": device,
        "command": _shown(argv, folder),
        "kernel": kernel,
        "start_s": start_s,
        "resident_gib": resident,
        "kv_cache_dtype": job.params["kv_cache_dtype"],
        "loads": speeds,
    }
    job.write_json("served.json", record)
    means = _means(scores) | {"start_s": start_s}
    for name, value in means.items():
        job.events.metric(name, value)
    return {**{name: record[name] for name in ("engine", "version", "kernel")}, **means}


def _onnx_server(job: Job, served: dict[str, Any], rows: Sequence[TokenRow], *, port: int) -> tuple[list[str], int]:
    """Our server around ONNX Runtime GenAI, which converts the files first; see onnx_genai.py.

    Raises:
        StageError: Rows of test do not fit its context.
    """
    context, room = _context(job, served, rows)
    words = [str(job.execution.server_python), "-P", onnx_genai.__file__, "--model", str(job.inputs["model"].path)]
    words += [
        "--convert",
        json.dumps(job.params["convert"]),
        "--scratch",
        str(job.out),
        "--served-model-name",
        job.slug,
    ]
    words += ["--max-model-len", str(context)] if context else []
    return [*words, "--port", str(port)], room


def _vllm_server(job: Job, served: dict[str, Any], rows: Sequence[TokenRow], *, port: int) -> tuple[list[str], int]:
    """The server of vLLM itself."""
    command, context = _command(job, served, rows)
    folder, python = job.inputs["model"].path, Path(str(job.execution.server_python))
    device = job.execution.device
    return engine_argv(command, folder, python=python, port=port, device=device, more=_more(job)), context


def _command(job: Job, served: dict[str, Any], rows: Sequence[TokenRow]) -> tuple[list[str], int]:
    """The command of serve.json with the recipe's serve section, and the context that it gives the engine.

    Raises:
        StageError: The engine does not serve these files; rows of test do not fit its context.
    """
    command = served["vllm"]["command"]
    if command is None:
        refused = served["vllm"]["refused"][0]
        raise StageError.of(**{part: refused[part] for part in ("what", "where", "why", "next")})
    context, room = _context(job, served, rows)
    ranks = {"--max-model-len": context, "--tensor-parallel-size": job.params["tensor_parallel"]}
    words = list(command)
    for option, value in ranks.items():
        if value and option in words:
            words[words.index(option) + 1] = str(value)
        elif value:
            words += [option, str(value)]
    words[words.index("--served-model-name") + 1] = job.slug
    return words, room


def _context(job: Job, served: dict[str, Any], rows: Sequence[TokenRow]) -> tuple[int | None, int]:
    """The context that the engine is given, if any, and how many tokens fit.

    Raises:
        StageError: Rows of test do not fit.
    """
    context = job.params["max_model_len"] or served["max_model_len"]
    longest = max((max(len(row.ids), len(row.prompt_ids)) + 1 for row in rows), default=1)
    if context and longest > context:
        raise StageError.of(
            what=f"a row of test has {longest - 1} tokens, and the engine's context is {context}",
            where="serve.max_model_len",
            why="the engine would refuse the row, and the others alone would be an easier set",
            next=f"set serve.max_model_len to {longest} or more",
        )
    return context, context or longest + job.params["max_new_tokens"]


def _more(job: Job) -> list[str]:
    dtype = job.params["kv_cache_dtype"]
    return [] if dtype == "auto" else ["--kv-cache-dtype", dtype]


def _environment(job: Job, folder: Path, context: int) -> dict[str, str]:
    """Of the engine; on a CPU with a KV cache that holds one sequence of the whole context, 1 GiB or more.

    Raises:
        StageError: The model's folder cannot be read.
    """
    env = dict(os.environ)
    if job.execution.device == "cpu" and job.params["engine"]["name"] == "vllm":
        try:
            headers = external_headers(folder)
        except RecipeError as error:
            raise StageError(error.problems[0]) from error
        env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(2 * headers.cache_numbers(context) / GIB)))
    return env


def _asked(
    job: Job, client: Client, rows: list[TokenRow], *, context: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of scores.parquet and of answers.parquet."""
    dataset = job.inputs["dataset"].path
    prompted = [row for row in rows if row.prompt_ids]
    progress = Progress(job.events, -(-len(rows) // AT_ONCE) + -(-len(prompted) // AT_ONCE), unit="request")
    scores = [
        score_line(row, "served_nll", loss, row.n)
        for row, loss in client.losses(rows, partial(progress.step, "completions"))
    ]
    prompting = Prompting.of(dataset / "tokenizer")
    answered = _answered(job, client, prompted, prompting, context=context, progress=progress) if prompted else {}
    graded = grade(prompted, [answered[row.row] for row in prompted], open_graders(job).answers)
    for metric, values in graded.scores.items():
        scores += [score_line(row, f"served_{metric}", value, 1) for row, value in values]
    own = _own_answers(job.inputs["scores"].path)
    answers = [
        {
            "row": row.row,
            "prompt": prompting.tokenizer.decode(row.prompt_ids),
            "reference": row.answer,
            "own": own[row.row],
            "served": answered[row.row].text,
            "equal": own[row.row] == answered[row.row].text,
            "ending": answered[row.row].ending,
            "score": verdict["score"],
        }
        for row, verdict in zip(prompted, graded.verdicts, strict=True)
    ]
    for row, line in zip(prompted, answers, strict=True):
        scores.append(score_line(row, "served_equal", float(line["equal"]), 1))
        scores.append(score_line(row, "served_truncated", answered[row.row].truncated, 1))
    return scores, answers


def _answered(
    job: Job, client: Client, rows: list[TokenRow], prompting: Prompting, *, context: int, progress: Progress
) -> dict[str, Answer]:
    """The engine's answer to each row, by its name."""
    reader, longest = prompting.reader(), job.params["max_new_tokens"]
    on_batch = partial(progress.step, "answers")
    decoded = client.answers(rows, prompting.ends, max_tokens=longest, context=context, on_batch=on_batch)
    return {row.row: reader.read(row, answer) for row, answer in decoded}


def _own_answers(scores: Path) -> dict[str, str]:
    """Row -> the answer that the arm gave when it was evaluated."""
    table = pq.read_table(scores / "answers.parquet", columns=["row", "answer"], filters=[("split", "==", "test")])
    return dict(zip(table["row"].to_pylist(), table["answer"].to_pylist(), strict=True))


def _speeds(job: Job, client: Client) -> list[dict[str, Any]]:
    speed = job.params["speed"]
    progress = Progress(job.events, len(REQUESTS) * (speed["repeats"] + 1), unit="request")
    return loads(client, job.inputs["dataset"].path, **speed, on_repeat=partial(progress.step, "speed"))


def _means(scores: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The means of the manifest."""
    by_name = means(scores)
    return {name: by_name[f"{metric}/test"] for metric, name in MEANS.items() if f"{metric}/test" in by_name}


def _shown(argv: Sequence[str], folder: Path) -> list[str]:
    """The command without this machine's paths."""
    shown = [word.replace(str(folder), "$PWD") for word in argv[1:]]
    if onnx_genai.__file__ in shown:
        scratch = shown.index("--scratch")
        shown[shown.index(onnx_genai.__file__)] = "tasks/jobs/serving/onnx_genai.py"
        del shown[scratch : scratch + 2]
    return ["python", *shown]
