"""Models from elsewhere as arms: what their files say is loaded, what their tokenizer allows is scored."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.arms import NOT_DECODED
from recipes.schemes.slugs import parse_scheme
from tasks.jobs import evaluate, measure, quantize, reference
from tasks.jobs.loading.load import load_arm, load_bf16
from tasks.jobs.measuring.own_tokenizer import read_rows_as
from tasks.jobs.measuring.teacher_forcing import read_rows
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, notes
from tests.jobs.test_evaluate import PARAMS, held_out, lines, score, train_to_answer, world  # noqa: F401  (a fixture)
from tests.tiny import other_tokenizer, write_base


def scored(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Metric -> row -> line."""
    by_metric: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines(out):
        by_metric.setdefault(line["metric"], {})[line["row"]] = line
    return by_metric


def saved(base: Path, out: Path, dtype: torch.dtype) -> Path:
    """The same model and tokenizer in another type."""
    shutil.copytree(base, out)
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(out)
    return out


def test_the_same_tokenizer_has_everything_in_the_type_of_its_files(world: Path, tmp_path: Path):  # noqa: F811
    means = score(world, tmp_path / "bf16")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        name = str(dtype).removeprefix("torch.")
        folder = saved(world / "base", tmp_path / f"in-{name}", dtype)
        assert load_arm("external", folder, device="cpu").dtype == dtype
        result = score(world, tmp_path / name, model=folder, kind="external")
        assert result.keys() == means.keys() and "absent" not in result
        same = {key: value for key, value in result.items() if key != "kernel"}
        if dtype == torch.bfloat16:
            assert same == {key: value for key, value in means.items() if key != "kernel"}
        else:
            assert result["nll/test"] == pytest.approx(means["nll/test"], rel=1e-2)
            assert result["nll/test"] != means["nll/test"]


def test_without_a_reference_only_kl_and_agreement_are_missing(world: Path, tmp_path: Path):  # noqa: F811
    inputs = {"dataset": world / "dataset", "model": world / "base"}
    job = make_job("evaluate", tmp_path / "out", params=PARAMS | {"kind": "external"}, **inputs)
    means = evaluate.run(job)
    assert set(means["absent"]) == {"kl", "agree"} and means["absent"]["kl"].startswith("no reference: ")
    assert set(scored(tmp_path / "out")) == {"nll", "nll_all", "nll_general", "bits", "task", "truncated"}
    assert lines(tmp_path / "out", "kl") == []


def test_another_tokenizer_has_bits_over_the_same_bytes_and_answers(world: Path, tmp_path: Path):  # noqa: F811
    folder = write_base(tmp_path / "other", tokenizer=other_tokenizer())
    means = score(world, tmp_path / "out", model=folder, kind="external")
    score(world, tmp_path / "base")
    theirs, ours = scored(tmp_path / "out"), scored(tmp_path / "base")
    assert set(theirs) == {"bits", "task", "truncated"}
    assert set(means["absent"]) == {"nll", "nll_all", "nll_general", "kl", "agree"}
    assert all(why.startswith("another tokenizer: ") for why in means["absent"].values())
    same = ("row", "group", "split", "domain", "n")
    for row, line in ours["bits"].items():
        assert [theirs["bits"][row][name] for name in same] == [line[name] for name in same]
    model, own = load_bf16(folder, device="cpu"), AutoTokenizer.from_pretrained(folder)
    for row in held_out(world):
        turns = json.loads(row["messages"])
        ids = own.apply_chat_template(turns, tokenize=True, return_dict=False)
        prompt = own.apply_chat_template(turns[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
        with torch.inference_mode():
            log_q = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll = -sum(log_q[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert theirs["bits"][row["row"]]["sum"] == pytest.approx(nll / math.log(2), rel=0.02)  # bf16 batches
    note = notes(make_job("evaluate", tmp_path / "out", params={}))["tokenizer"]
    assert "in its own tokens" in note


def test_another_tokenizers_answers_end_with_its_own_turn(world: Path, tmp_path: Path):  # noqa: F811
    folder = write_base(tmp_path / "other", tokenizer=other_tokenizer())
    rows = read_rows(world / "dataset", "dev", "test")
    read = read_rows_as(folder, world / "dataset", rows, why="", chat_template=None, longest=None).rows
    knowing = [{"input_ids": row.ids, "completion_mask": row.counted} for row in read]
    trained = train_to_answer(folder, tmp_path / "trained", knowing)
    (trained / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "repetition_penalty": 9.0}))
    means = score(world, tmp_path / "out", model=trained, kind="external", max_new_tokens=40)  # nearly a byte a token
    assert means["task/test"] == means["task/dev"] == 1
    for answer in lines(tmp_path / "out", "answers"):
        assert answer["answer"] == answer["reference"]
        assert answer["prompt"].endswith("<|assistant|>")
    alone = {"model": trained, "kind": "external", "max_new_tokens": 40, "decoded": ["test"]}
    told = score(world, tmp_path / "test", **alone)["absent"]
    assert told["task/dev"] == NOT_DECODED and told["nll"].startswith("another tokenizer: ")
    of_test = [answer for answer in lines(tmp_path / "out", "answers") if answer["split"] == "test"]
    assert lines(tmp_path / "test", "answers") == of_test and of_test


def test_a_padded_vocabulary_is_compared_over_the_tokens_that_both_have(world: Path, tmp_path: Path):  # noqa: F811
    padded = tmp_path / "padded"
    shutil.copytree(world / "base", padded)
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.bfloat16)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(padded)
    score(world, tmp_path / "plain")
    means = score(world, tmp_path / "out", model=padded, kind="external")
    assert "absent" not in means
    plain, found = scored(tmp_path / "plain")["kl"], scored(tmp_path / "out")["kl"]
    assert {row: one["sum"] for row, one in found.items()} == pytest.approx(
        {row: one["sum"] for row, one in plain.items()}, rel=1e-6
    )


@pytest.mark.parametrize("scheme", ["rtn-w4-g32", "nf4"])
def test_a_quantized_checkpoint_is_loaded_as_its_config_says(world: Path, tmp_path: Path, scheme: str):  # noqa: F811
    quantized = tmp_path / "quantized"
    params = {**parse_scheme(scheme).params(), "seed": 0, "damp": 0.05}
    quantize.run(make_job("quantize", quantized, params=params, model=world / "base"))
    external = score(world, tmp_path / "external", model=quantized, kind="external")
    assert external == score(world, tmp_path / "own", model=quantized, kind="quantized")
    assert external["kernel"] != "Linear"


def damaged(base: Path, out: Path, how: str) -> Path:
    shutil.copytree(base, out)
    file = out / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    return out


def test_a_damaged_folder_is_no_arm(world: Path, tmp_path: Path):  # noqa: F811
    # Transformers would put random numbers in the place of a missing weight.
    folder = damaged(world / "base", tmp_path / "missing", "missing")
    with pytest.raises(StageError, match=r"1 weights of the model are not in the checkpoint: .*down_proj"):
        score(world, tmp_path / "out", model=folder, kind="external")
    folder = damaged(world / "base", tmp_path / "truncated", "truncated")
    with pytest.raises(Exception, match=r"(?i)incomplete|header|file not fully covered"):
        score(world, tmp_path / "out-2", model=folder, kind="external")


def judged(world: Path, out: Path, model: Path) -> dict[str, Any]:  # noqa: F811
    params = {"batch_size": 4, "reference_gib": 4.0, "seed": 0, "kind": "external"}
    return reference.run(make_job("reference", out, params=params, dataset=world / "dataset", model=model))


def test_an_external_model_is_the_reference(world: Path, tmp_path: Path):  # noqa: F811
    judge = write_base(tmp_path / "judge", seed=7)
    judged(world, tmp_path / "reference", judge)
    own = score(world, tmp_path / "own", model=judge, kind="external", reference=tmp_path / "reference")
    assert own["kl/test"] == 0 and own["agree/test"] == 1
    other = score(world, tmp_path / "base", reference=tmp_path / "reference")
    assert other["kl/test"] > 0.01
    with pytest.raises(StageError, match="the reference has another tokenizer: "):
        judged(world, tmp_path / "refused", write_base(tmp_path / "other", tokenizer=other_tokenizer()))


def test_speed_is_measured_on_its_own_tokens(world: Path, tmp_path: Path):  # noqa: F811
    folder = write_base(tmp_path / "small", tokenizer=other_tokenizer(vocabulary=262))
    largest = max(token for row in held_out(world) for token in row["input_ids"])
    assert largest >= 262  # the dataset's ids would be none of this model's
    params = {"kind": "external", "batch": 2, "prompt_tokens": 8, "new_tokens": 2, "repeats": 1}
    speed = measure.run(make_job("measure", tmp_path / "out", params=params, model=folder, dataset=world / "dataset"))
    assert speed["prefill_tokens_per_s"] > 0
