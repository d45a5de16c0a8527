"""Tasks of lm-eval that no arm is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.runtime.process.errors import StageError

TASK = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_that_runs_what_the_model_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.jobs.scorers.harness import Harness

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "quiz.jsonl").write_text('{"q": "1 + 1", "a": "2"}\n')
    (tmp_path / "quiz.yaml").write_text(TASK)
    params = {"tasks": ["quiz"], "metric": None, "limit": None, "chat_template": True}
    assert Harness(params, tmp_path).documents == {"quiz": 1}
    (tmp_path / "quiz.yaml").write_text(TASK + "unsafe_code: true\n")
    with pytest.raises(StageError, match="runs code that the model writes"):
        Harness(params, tmp_path)
