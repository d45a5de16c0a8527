"""A vision-language base from rows to scores: its towers and its processor come out as they went in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Gemma3ForConditionalGeneration, Gemma3Processor

from tasks.jobs import evaluate, merge, prepare, reload, train
from tasks.runtime.tokenizer_files import PROCESSOR_FILES, TOKENIZER_FILES, copy_files
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_evaluate import PARAMS as EVALUATE
from tests.jobs.test_prepare import PARAMS as PREPARE
from tests.jobs.test_prepare import chat, questions
from tests.jobs.test_train import job_for
from tests.jobs.whole_models import write_whole


def test_a_processors_files_go_where_the_tokenizer_goes(tmp_path: Path):
    base = write_whole(tmp_path / "base", "qwen3-vl")
    (tmp_path / "copy").mkdir()
    copy_files(base, tmp_path / "copy", TOKENIZER_FILES)
    processor = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
    assert processor < {path.name for path in (tmp_path / "copy").iterdir()}
    assert processor < set(PROCESSOR_FILES)


def towers(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors outside the text decoder, by their names in the checkpoint."""
    found = {key: tensor for key, tensor in load_file(folder / "model.safetensors").items() if "language" not in key}
    assert len(found) > 20
    return found


@pytest.mark.slow
@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_from_rows_to_scores(onto: str, tmp_path: Path):
    base = write_whole(tmp_path / "base", "gemma3-whole")
    rows = questions(40) + [{"messages": chat(f"say {i}", f"{i} " * (1 + i % 20))} for i in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset, adapter, merged = (tmp_path / name for name in ("dataset", "adapter", "merged"))
    prepare.run(make_job("prepare", dataset, params=PREPARE, data=data, tokenizer=base))
    job = job_for(adapter, base, dataset, max_steps=8)
    result = train.run(job)
    assert "GiB" in notes(job)["towers"] and result["gradient_cosine"] > 0.999
    merge.run(make_job("merge", merged, params={"onto": onto}, base=base, adapter=adapter))

    before, after = towers(base), towers(merged)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    model = Gemma3ForConditionalGeneration.from_pretrained(merged, dtype=torch.bfloat16)
    start = Gemma3ForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        same = torch.equal(parameter, start.get_parameter(key))
        assert same == (not (key.startswith("model.language_model.layers.") and "proj" in key))
    processor = AutoProcessor.from_pretrained(merged)
    assert isinstance(processor, Gemma3Processor) and processor.image_seq_length == 4

    scored = evaluate.run(
        make_job("evaluate", tmp_path / "scores", params=EVALUATE | {"kind": "bf16"}, dataset=dataset, model=merged)
    )
    assert 0 < scored["nll/dev"] < 5.7  # what all of the vocabulary alike would give
    copied = make_job("reload", tmp_path / "reload", params={"kind": "bf16"}, model=merged, copy=merged)
    assert reload.run(copied)["largest_difference"] == 0
