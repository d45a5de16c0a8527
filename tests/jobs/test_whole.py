"""A vision-language base from rows to scores: its towers and its processor come out as they went in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Gemma3Processor

from tasks.jobs import evaluate, merge, prepare, reload, train
from tasks.jobs.loading.classes import empty_model, text_linears
from tasks.runtime.pin import Digests, external_folder
from tasks.runtime.tokenizer_files import PROCESSOR_FILES, TOKENIZER_FILES, copy_files
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_evaluate import PARAMS as EVALUATE
from tests.jobs.test_prepare import PARAMS as PREPARE
from tests.jobs.test_prepare import chat, questions
from tests.jobs.test_train import job_for
from tests.jobs.whole_models import WHOLE, write_whole

TOWERS = ("vision", "visual", "audio", "projector", "connector")  # in the names of what lies outside the text decoder


def test_a_processors_files_go_where_the_tokenizer_goes(tmp_path: Path):
    base = write_whole(tmp_path / "base", "qwen3-vl")
    (tmp_path / "copy").mkdir()
    copy_files(base, tmp_path / "copy", TOKENIZER_FILES)
    processor = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
    assert processor < {path.name for path in (tmp_path / "copy").iterdir()}
    assert processor < set(PROCESSOR_FILES)
    patterns = (*TOKENIZER_FILES, "config.json")  # as a recipe's base is pinned
    first, second = (_digest(base, tmp_path / name, patterns) for name in ("a", "b"))
    (base / "preprocessor_config.json").write_text('{"size": 64}')
    assert first == second != _digest(base, tmp_path / "c", patterns)


def _digest(folder: Path, home: Path, patterns: tuple[str, ...]) -> str:
    return external_folder("tokenizer", folder, patterns=patterns, digests=Digests(home)).digest


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_from_rows_to_scores(name: str, tmp_path: Path):
    base = write_whole(tmp_path / "base", name)
    rows = questions(40) + [{"messages": chat(f"say {i}", f"{i} " * (1 + i % 20))} for i in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset, adapter, merged = (tmp_path / part for part in ("dataset", "adapter", "merged"))
    prepare.run(make_job("prepare", dataset, params=PREPARE, data=data, tokenizer=base))
    job = job_for(adapter, base, dataset, max_steps=8, accept_unquantized=True)  # Llama 4 has experts
    result = train.run(job)
    assert "GiB" in notes(job)["towers"] and result["gradient_cosine"] > 0.999
    merge.run(make_job("merge", merged, params={"onto": "dequantized"}, base=base, adapter=adapter))

    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not [key for key in changed if any(word in key for word in TOWERS)]
    assert len(changed) == len(text_linears(empty_model(base)))
    for path in base.glob("*processor*"):
        assert (merged / path.name).read_bytes() == path.read_bytes()
    if name == "gemma3-whole":
        processor = AutoProcessor.from_pretrained(merged)
        assert isinstance(processor, Gemma3Processor) and processor.image_seq_length == 4

    scoring = make_job("evaluate", tmp_path / "scores", params=EVALUATE, dataset=dataset, model=merged)
    assert 0 < evaluate.run(scoring)["nll/dev"] < 5.7  # what all of the vocabulary alike would give
    copied = make_job("reload", tmp_path / "reload", params={"kind": "bf16"}, model=merged, copy=merged)
    assert reload.run(copied)["largest_difference"] == 0
