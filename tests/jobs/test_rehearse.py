"""Rehearse: references that the tokenizer changes and leaks are refused before anything is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from recipes.schema import Evaluate
from tasks.jobs import prepare, rehearse
from tasks.jobs.measuring.teacher_forcing import read_rows
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_evaluate import THINKING
from tests.jobs.test_prepare import PARAMS, chat
from tests.tiny import PLAIN, write_tokenizer

LOOSE = """
def score(answer, reference, columns):
    return answer.lower() == reference.lower()
"""


def prepared(
    folder: Path, answers: list[str], *, tokenizer: Path | None = None, change: dict[str, Any] | None = None
) -> Path:
    """A dataset of questions with these answers by turns."""
    tokenizer = tokenizer or write_tokenizer(folder / "tokenizer", PLAIN)
    if change:
        path = tokenizer / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    rows = [{"messages": chat(f"what is {i} ?", answers[i % len(answers)])} for i in range(60)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    prepare.run(make_job("prepare", folder / "dataset", params=PARAMS, data=data, tokenizer=tokenizer))
    return folder / "dataset"


def rehearsed(folder: Path, dataset: Path, *scorers: dict[str, Any], **params: Any) -> dict[str, str]:
    """The notes of a rehearsal with these scorers, exact match by default."""
    every = Evaluate.model_validate({"scorers": list(scorers) or [{"kind": "exact-match"}]}).scorers
    given = {"max_new_tokens": 96, "max_near_duplicates": 0.01, "group": None} | params
    params = {"scorers": [one.params() for one in every]} | given
    files = {"scorer-0": folder / "own.py"} if scorers else {}
    job = make_job("rehearse", folder / "rehearsed", params=params, dataset=dataset, **files)
    rehearse.run(job)
    return notes(job)


def lower_casing(folder: Path) -> Path:
    """A tokenizer that makes every text lower case, as those of some encoders do."""
    written = write_tokenizer(folder, PLAIN)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(written)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(written)
    return written


@pytest.mark.parametrize("template", [PLAIN, THINKING])
def test_references_that_come_back_as_they_are_pass(tmp_path: Path, template: str) -> None:
    answers = ["Blue ,  it is .", " spaced\n\nout ", "je né sais 何か 🎈", "x = {'a': 1}\n\tif x : pass"]
    if template == THINKING:
        answers = [f"it may be\n</think>\n\n{answer.strip()}" for answer in answers]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template)
    said = rehearsed(tmp_path, prepared(tmp_path, answers, tokenizer=tokenizer))
    assert said["scorers"].startswith("exact-match accept all ")


def test_an_answer_with_a_special_token_is_refused_with_its_row(tmp_path: Path) -> None:
    """Its tokens end where the token stands: no model can say the rest of it."""
    answers = ["blue"] * 3 + ["a turn ends with <|im_start|> then text"]
    with pytest.raises(StageError, match="tokenizer changes the reference answers") as refused:
        rehearsed(tmp_path, prepared(tmp_path, answers))
    problem = refused.value.problem
    rows = problem.where.removeprefix("rows ").split(", ")
    assert problem.what.startswith(f"the base's tokenizer changes the reference answers of {len(rows)} row(s)")
    assert "'a turn ends with <|im_start|> then text'" in problem.why and "'a turn ends with  then text'" in problem.why
    assert "special tokens" in problem.next


def test_an_answer_with_the_end_of_a_turn_in_it_is_refused_by_prepare_or_here(tmp_path: Path) -> None:
    with pytest.raises(StageError) as refused:
        rehearsed(tmp_path, prepared(tmp_path, ["blue"] * 3 + ["a turn ends with <|im_end|> then text"]))
    assert "row" in refused.value.problem.where


def test_a_tokenizer_that_lower_cases_is_refused_unless_the_scorer_lets_it_pass(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, ["Blue", "green"], tokenizer=lower_casing(tmp_path / "tokenizer"))
    with pytest.raises(StageError, match="tokenizer changes") as refused:
        rehearsed(tmp_path, dataset)
    assert "the data has 'Blue', its tokens are 'blue'" in refused.value.problem.why
    (tmp_path / "own.py").write_text(LOOSE)
    assert rehearsed(tmp_path, dataset, {"kind": "python", "callable": "own.py:score"})["scorers"]


def test_a_decoding_that_takes_spaces_away_is_refused(tmp_path: Path) -> None:
    asked = {"clean_up_tokenization_spaces": True}  # as Llama 3 has it; transformers does not do it to a BPE ...
    dataset = prepared(tmp_path, ["it is n't , you know ."], change=asked)
    assert rehearsed(tmp_path, dataset)["scorers"]
    insists = asked | {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}  # ... unless
    path = dataset / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | insists))
    with pytest.raises(StageError, match="tokenizer changes") as refused:
        rehearsed(tmp_path, dataset)
    assert '"it isn\'t, you know."' in refused.value.problem.why


def test_leaks_are_refused_above_the_limit(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, ["blue"])
    summary = json.loads((dataset / "summary.json").read_text())
    leaks = {"train": 200, "rows": 3, "twins": 3, "exchanges": 0, "examples": "\n    rows.jsonl:3 like rows.jsonl:9"}
    (dataset / "summary.json").write_text(json.dumps(summary | {"leaks": leaks}))
    with pytest.raises(StageError, match="3 of 200 train rows are in dev or test") as refused:
        rehearsed(tmp_path, dataset)
    assert "rows.jsonl:3 like rows.jsonl:9" in refused.value.problem.why
    assert rehearsed(tmp_path, dataset, max_near_duplicates=0.015)["scorers"]
    summary.pop("leaks", None)
    (dataset / "summary.json").write_text(json.dumps(summary))  # data.near_duplicates: ignore
    assert rehearsed(tmp_path, dataset)["scorers"]


def test_a_limit_that_cuts_off_the_datas_own_answers_is_refused_with_one_that_does_not(tmp_path: Path) -> None:
    """Counted as trained: thinking, and the token that ends the turn."""
    answers = ["so\n</think>\n\nred", "it may be\n</think>\n\nblue and " * 2]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", THINKING)
    dataset = prepared(tmp_path, answers, tokenizer=tokenizer)
    rows = [row for row in read_rows(dataset, "dev", "test") if "</think>" in row.answer or "blue" in row.answer]
    longest = max(row.ids.index(2, len(row.prompt_ids)) + 1 - len(row.prompt_ids) for row in rows)
    assert longest > 20
    with pytest.raises(StageError) as refused:
        rehearsed(tmp_path, dataset, max_new_tokens=longest - 1)
    problem = refused.value.problem
    of = len([row for row in read_rows(dataset, "dev", "test") if row.prompt_ids])
    assert problem.what.startswith(f"{len(rows)} of {of} reference answers") and f"{longest - 1}" in problem.what
    assert str(longest) in problem.why
    assert set(problem.where.removeprefix("rows ").split(", ")) <= {row.row for row in rows}
    enough = int(re.findall(r"max_new_tokens: (\d+)", problem.next)[0])
    assert longest <= enough < longest + 16
    for limit in (longest, enough):
        assert rehearsed(tmp_path, dataset, max_new_tokens=limit)["scorers"]


def test_references_that_never_close_what_their_prompt_opens_are_refused(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", THINKING)
    dataset = prepared(tmp_path, ["it may be\n</think>\n\nblue", "red"], tokenizer=tokenizer)
    with pytest.raises(StageError, match="reference answers of dev and test are thinking that never ends") as refused:
        rehearsed(tmp_path, dataset)
    named = set(refused.value.problem.where.removeprefix("rows ").split(", "))
    assert named == {row.row for row in read_rows(dataset, "dev", "test") if row.answer == "red"}
    assert "<think>" in refused.value.problem.why and "enable_thinking" in refused.value.problem.next
