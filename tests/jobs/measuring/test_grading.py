"""Several scorers on one decoding, scorers that fail, and lm-evaluation-harness tasks, through the evaluate job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.schema import Evaluate
from tasks.jobs import evaluate, prepare, rehearse
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, write_jsonl
from tests.jobs.test_evaluate import ANSWERS, PARAMS, held_out, lines, train_to_answer, world

__all__ = ["world"]  # a fixture
OWN = """
def length(answer, reference, columns):
    return min(len(answer), len(reference)) / max(len(answer), len(reference), 1)

def fussy(answer, reference, columns):
    if answer != reference:
        raise KeyError(answer)
    return True

def shared(answer, reference, columns):
    return 0.5 if answer != reference else 1

def wild(answer, reference, columns):
    return 1 if answer == reference else 1.5
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: docs.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
target_delimiter: ""
doc_to_choice: ["blue", "the sky is blue", "SELECT name FROM books"]
doc_to_target: "{{['blue', 'the sky is blue', 'SELECT name FROM books'].index(answer)}}"
metric_list: [{metric: acc}]
"""


def scored(world: Path, out: Path, scorers: list[dict[str, Any]], *, model: Path | None = None, **content: Path) -> Any:
    """The evaluate job with scorers as a recipe has them."""
    params = [scorer.params() for scorer in Evaluate.model_validate({"scorers": scorers}).scorers]
    inputs = {
        "model": model or world / "base",
        "dataset": world / "dataset",
        "reference": world / "reference",
        **content,
    }
    return evaluate.run(make_job("evaluate", out, params=PARAMS | {"scorers": params}, **inputs))


def python(function: str) -> dict[str, Any]:
    return {"kind": "python", "name": function, "callable": f"own.py:{function}"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_to_answer(world / "base", tmp_path_factory.mktemp("trained") / "model", held_out(world))


@pytest.fixture(scope="module")
def mistaken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends each of its answers, and gives every row the answer to another one."""
    rows = held_out(world)
    swapped: list[dict[str, Any]] = []
    for row in rows:
        other = ANSWERS[(ANSWERS.index(row["answer"]) + 1) % len(ANSWERS)]
        theirs = next(one for one in rows if one["answer"] == other)
        own, start = len(row["prompt_ids"]), len(theirs["prompt_ids"])
        ids = row["prompt_ids"] + theirs["input_ids"][start:]
        swapped.append({"input_ids": ids, "completion_mask": [False] * own + theirs["completion_mask"][start:]})
    return train_to_answer(world / "base", tmp_path_factory.mktemp("mistaken") / "model", swapped)


@pytest.fixture(scope="module")
def tasks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks whose documents are the rows of test, which `trained` knows by heart."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.loads(row["messages"]) for row in held_out(world) if row["split"] == "test"]
    write_jsonl(folder / "docs.jsonl", [{"question": one[0]["content"], "answer": one[1]["content"]} for one in rows])
    (folder / "sky.yaml").write_text(TASK.format(name="sky-answers") + GENERATE)
    (folder / "pick.yaml").write_text(TASK.format(name="sky-choices") + CHOOSE)
    broken = GENERATE.replace("{{answer}}", "{{answer[0][1][2].x}}")
    (folder / "broken.yaml").write_text(TASK.format(name="sky-broken") + broken)
    return folder


def test_all_scorers_score_one_decoding(world: Path, mistaken: Path, own: Path, tmp_path: Path) -> None:
    scorers = [{"kind": "exact-match"}, python("length"), {"kind": "exact-match", "name": "again"}]
    means = scored(world, tmp_path / "out", scorers, model=mistaken, **{"scorer-1": own})
    scores = lines(tmp_path / "out")
    rows = {row["row"] for row in held_out(world)}
    for metric in ("task", "task.length", "task.again"):
        assert {line["row"] for line in scores if line["metric"] == metric} == rows
    assert 0 < means["task.length/test"] < 1
    assert "problems" not in means
    for answer in lines(tmp_path / "out", "answers"):
        verdicts = json.loads(answer["scores"])
        assert list(verdicts) == ["exact-match", "length", "again"]
        assert verdicts["exact-match"] == verdicts["again"] == {"score": answer["score"], "error": answer["error"]}
        own_words, wanted = len(answer["answer"]), len(answer["reference"])
        assert verdicts["length"]["score"] == min(own_words, wanted) / max(own_words, wanted, 1)


@pytest.mark.parametrize(
    ("function", "why"), [("fussy", "fussy raised KeyError"), ("wild", "returned 1.5, which is no")]
)
def test_a_scorer_that_fails_leaves_no_mean_and_all_other_scores(
    world: Path, mistaken: Path, own: Path, tmp_path: Path, function: str, why: str
) -> None:
    scorers = [python(function), {"kind": "exact-match"}]
    means = scored(world, tmp_path / "out", scorers, model=mistaken, **{"scorer-0": own})
    (metric, problem) = next(iter(means["problems"].items()))
    rows = held_out(world)
    assert metric == "task"
    assert problem["what"] == f"the scorer {function} failed on {len(rows)} of {len(rows)} answers"
    assert any(row["row"] in problem["where"] for row in rows) and ", answer " in problem["where"]
    assert why in problem["why"]
    metrics = {line["metric"] for line in lines(tmp_path / "out")}
    assert "task" not in metrics and {"task.exact-match", "nll", "kl"} <= metrics
    assert "task/test" not in means and means["task.exact-match/test"] == 0
    assert {answer["score"] for answer in lines(tmp_path / "out", "answers")} == {None}


def test_one_answer_that_cannot_be_scored_takes_the_mean_of_all(world: Path, mistaken: Path, tmp_path: Path) -> None:
    picky = tmp_path / "picky.py"
    picky.write_text(
        "seen = []\n\ndef picky(answer, reference, columns):\n    seen.append(answer)\n"
        f"    assert len(seen) != {len(held_out(world)) + 3}, 'the third answer'\n    return 1\n"
    )
    scorer = {"kind": "python", "callable": "picky.py:picky"}
    means = scored(world, tmp_path / "out", [{"kind": "exact-match"}, scorer], model=mistaken, **{"scorer-1": picky})
    assert means["problems"]["task.python"]["what"].startswith("the scorer python failed on 1 of")
    assert "AssertionError: the third answer" in means["problems"]["task.python"]["why"]
    assert "task.python" not in {line["metric"] for line in lines(tmp_path / "out")}


def test_a_file_that_cannot_be_loaded_is_refused_before_the_model(world: Path, own: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import beside_me\n")
    with pytest.raises(StageError, match="No module named 'beside_me'"):
        scored(world, tmp_path / "out", [python("score")], model=tmp_path / "nothing", **{"scorer-0": broken})
    with pytest.raises(StageError, match="it has no callable named"):
        scored(world, tmp_path / "out", [python("absent")], model=tmp_path / "nothing", **{"scorer-0": own})


def test_a_row_without_reference_answer_is_named(world: Path, tmp_path: Path) -> None:
    rows = pq.read_table(world / "dataset" / "rows.parquet").to_pylist()
    bare = next(row for row in rows if row["split"] == "test")
    bare["answer"] = " "
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for name in ("tokenizer", "general.parquet"):
        (dataset / name).symlink_to(world / "dataset" / name)
    pq.write_table(pa.Table.from_pylist(rows, schema=prepare.ROWS), dataset / "rows.parquet")
    with pytest.raises(StageError, match="have no reference answer") as refused:
        scored(world, tmp_path / "out", [{"kind": "exact-match"}], model=tmp_path / "nothing", dataset=dataset)
    assert refused.value.problem.where == f"rows {bare['row']}"


def test_a_scorer_that_rejects_the_data_is_refused_with_the_rows(world: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the scorer number rejects the reference answers") as refused:
        scored(world, tmp_path / "out", [{"kind": "exact-match"}, {"kind": "number"}], model=tmp_path / "nothing")
    assert "no number in the reference" in refused.value.problem.why


def test_a_rehearsal_finds_it_before_training(world: Path, tasks: Path, tmp_path: Path) -> None:
    def rehearsed(scorers: list[dict[str, Any]]) -> dict[str, Any]:
        every = Evaluate.model_validate({"scorers": scorers}).scorers
        inputs = {"dataset": world / "dataset", "scorer-1": tasks}
        params = {"scorers": [scorer.params() for scorer in every], "max_near_duplicates": 1.0, "group": None}
        params["max_new_tokens"] = PARAMS["max_new_tokens"]
        return rehearse.run(make_job("rehearse", tmp_path / "out", params=params, **inputs))

    rows = held_out(world)
    test = sum(row["split"] == "test" for row in rows)
    sky = {"kind": "lm-eval", "name": "sky", "tasks": ["sky-answers", "sky-choices"], "limit": 3}
    result = rehearsed([{"kind": "exact-match"}, sky])
    longest = max(row["input_ids"].index(2, len(row["prompt_ids"])) + 1 - len(row["prompt_ids"]) for row in rows)
    documents = {"task.sky": {"sky-answers": 3, "sky-choices": 3}}
    assert result == {"references": len(rows), "longest_tokens": longest, "documents": documents}
    assert rehearsed([{"kind": "exact-match"}, sky | {"limit": 999}])["documents"]["task.sky"]["sky-answers"] == test
    with pytest.raises(StageError, match="the scorer number rejects the reference answers"):
        rehearsed([{"kind": "number"}])
    with pytest.raises(StageError, match="no task sky-answer"):
        rehearsed([{"kind": "exact-match"}, sky | {"tasks": ["sky-answer"]}])


# ---- lm-evaluation-harness


def test_documents_are_asked_by_the_template_and_end_with_the_turn(
    world: Path, trained: Path, tasks: Path, tmp_path: Path
) -> None:
    scorers = [{"kind": "exact-match"}, {"kind": "lm-eval", "name": "sky", "tasks": ["sky-answers", "sky-choices"]}]
    test = [row for row in held_out(world) if row["split"] == "test"]
    means = scored(world, tmp_path / "out", scorers, model=trained, **{"scorer-1": tasks})
    documents = [line for line in lines(tmp_path / "out") if line["metric"] == "task.sky"]
    assert len(documents) == 2 * len(test) >= 10
    assert {line["split"] for line in documents} == {"test"}
    assert all(line["group"] == line["row"] and line["n"] == 1 for line in documents)
    assert {line["domain"] for line in documents} == {"sky-answers", "sky-choices"}
    # By heart, and every answer ends: an answer that ran on would be no exact match.
    assert means["task.sky/test"] == means["task/test"] == 1
    base = scored(world, tmp_path / "base", scorers, **{"scorer-1": tasks})
    assert base["task.sky/test"] < 0.8
    rows = [[line["row"] for line in lines(tmp_path / arm) if line["metric"] == "task.sky"] for arm in ("out", "base")]
    assert rows[0] == rows[1]  # paired by document


def test_documents_are_asked_through_the_arms_kv_cache(world: Path, trained: Path, tasks: Path) -> None:
    from tasks.jobs.loading.load import load_bf16
    from tasks.jobs.measuring.kv_cache import KVCache
    from tasks.jobs.scorers.harness import Harness
    from tasks.jobs.text.tokenizer import load_tokenizer

    (scorer,) = Evaluate.model_validate(
        {"scorers": [{"kind": "exact-match"}, {"kind": "lm-eval", "tasks": ["sky-answers", "sky-choices"], "limit": 3}]}
    ).scorers[1:]
    model, tokenizer = load_bf16(trained, device="cpu"), load_tokenizer(world / "dataset" / "tokenizer")
    caches = KVCache(config=model.config, kind="int8")
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    documents = Harness(scorer.params(), tasks).run(model, tokenizer, ends=ends, batch_size=3, caches=caches)
    # int8 costs a model that knows them by heart little
    assert len(documents) == 6 and sum(document.score for document in documents) >= 5
    assert caches.layers == {0, 1}


def test_an_answer_ends_with_its_turn_and_not_by_a_stop_string(world: Path, trained: Path, tasks: Path) -> None:
    """The task has a stop string of its own, and the tokenizer does not call the end of a turn its end."""
    from tasks.jobs.loading.load import load_bf16
    from tasks.jobs.scorers.harness import Harness
    from tasks.jobs.text.tokenizer import load_tokenizer

    unended = GENERATE.replace("<|im_end|>", "never said")
    (tasks / "unended.yaml").write_text(TASK.format(name="sky-unended") + unended)
    scorers = [{"kind": "exact-match"}, {"kind": "lm-eval", "tasks": ["sky-unended"]}]
    scorer = Evaluate.model_validate({"scorers": scorers}).scorers[1]
    model, tokenizer = load_bf16(trained, device="cpu"), load_tokenizer(world / "dataset" / "tokenizer")
    tokenizer.eos_token = "<|endoftext|>"
    first = [tokenizer(text)["input_ids"][0] for text in ANSWERS]
    ended, cut = (
        [document.score for document in Harness(scorer.params(), tasks).run(model, tokenizer, ends=ends, batch_size=4)]
        for ends in ([tokenizer.convert_tokens_to_ids("<|im_end|>")], first)
    )
    assert set(ended) == {1.0}
    assert sum(cut) < len(cut)  # the ids that are given are what ends an answer: here, its first token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["sky-answer"]}, r"no task sky-answer\n.*\n.*\n.*did you mean sky-answers\?"),
        ({"tasks": ["sky-answers"], "metric": "f1"}, "has no metric `f1`"),
        ({"tasks": ["sky-broken"]}, "the first document of the task sky-broken cannot be asked"),
        ({"tasks": ["hellaswag"]}, r"task\(s\) hellaswag cannot be loaded"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model(
    world: Path, tasks: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    scorers = [{"kind": "exact-match"}, {"kind": "lm-eval", **changes}]
    with pytest.raises(StageError, match=message):
        scored(world, tmp_path / "out", scorers, model=tmp_path / "nothing", **{"scorer-1": tasks})
