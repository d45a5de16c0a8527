"""Reference and evaluate: KL of the reference to itself is 0, sums are what a plain loop gives, answers end."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from recipes.arms import NOT_DECODED
from tasks.jobs import evaluate, prepare, reference
from tasks.jobs.evaluate import divergence
from tasks.jobs.loading.load import load_bf16
from tasks.jobs.measuring import teacher_forcing, tiles
from tasks.jobs.measuring.decoding import before_end, greedy_answers
from tasks.jobs.measuring.teacher_forcing import TokenRow, completion_bytes
from tasks.runtime.process.errors import StageError
from tests.jobs.build import curve, make_job, notes, write_jsonl
from tests.jobs.test_merge import plant_adapter
from tests.jobs.test_prepare import PARAMS as PREPARE
from tests.jobs.test_prepare import chat
from tests.tiny import PLAIN, write_base

EXACT = {"kind": "exact-match", "name": "exact-match"}
PARAMS = {"kind": "bf16", "scorers": [EXACT], "max_new_tokens": 12, "batch_size": 4, "seed": 0}
DECODED = ("task", "truncated")
SCORED = ("nll", "nll_all", "bits", "kl", "agree", *DECODED)
THINKING = PLAIN.replace("assistant\n' -}}{%- endif", "assistant\n<think>\n' -}}{%- endif").replace(
    "'\n' + message['content']", "'\n' + ('<think>\n' if message['role'] == 'assistant' else '') + message['content']"
)
ANSWERS = ("blue", "the sky is blue", "SELECT name FROM books")  # of different lengths


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, dataset/, adapter/ and reference/ of a tiny model; some 20 rows in dev and test."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = write_base(folder / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what {'is ' * (i % 5)}{i % 3} ?" + " the" * (i // 3)},
                {"role": "assistant", "content": ANSWERS[i % 3]},
            ]
        }
        for i in range(60)
    ]
    data = write_jsonl(folder / "rows.jsonl", rows)
    general = write_jsonl(folder / "general.jsonl", [{"text": f"the sky is blue {i} " * 3} for i in range(6)])
    prepare.run(make_job("prepare", folder / "dataset", params=PREPARE, data=data, general=general, tokenizer=base))
    plant_adapter(base, folder / "adapter")
    refer(folder, folder / "reference")
    return folder


def refer(world: Path, out: Path, *, gib: float = 4.0) -> dict[str, Any]:
    params = {"batch_size": 4, "reference_gib": gib, "seed": 0}
    inputs = {name: world / name for name in ("dataset", "base", "adapter")}
    return reference.run(make_job("reference", out, params=params, **inputs))


def score(world: Path, out: Path, *, model: Path | None = None, **changed: Any) -> dict[str, Any]:
    inputs = {name: world / name for name in ("dataset", "reference")} | {"model": model or world / "base"}
    inputs |= {name: changed.pop(name) for name in ("adapter", "reference", "dataset", "calibset") if name in changed}
    return evaluate.run(make_job("evaluate", out, params=PARAMS | changed, **inputs))


def lines(out: Path, name: str = "scores") -> list[dict[str, Any]]:
    return pq.read_table(out / f"{name}.parquet").to_pylist()


def held_out(world: Path) -> list[dict[str, Any]]:
    return [row for row in pq.read_table(world / "dataset" / "rows.parquet").to_pylist() if row["split"] != "train"]


def test_the_reference_scored_against_itself_is_exactly_0(world: Path, tmp_path: Path) -> None:
    means = score(world, tmp_path / "out", kind="nf4", adapter=world / "adapter")
    for split in ("dev", "test"):
        assert means[f"kl/{split}"] == 0
        assert means[f"agree/{split}"] == 1
    assert all(line["kl"] == 0 for line in lines(tmp_path / "out", "kl"))
    assert means["kernel"] == "Linear4bit"


def test_sums_are_those_of_a_loop_over_single_rows(world: Path, tmp_path: Path) -> None:
    means = score(world, tmp_path / "out")
    scores = {(line["row"], line["metric"]): line for line in lines(tmp_path / "out")}
    model = load_bf16(world / "base", device="cpu")
    stored = safe_open(world / "reference" / "reference.safetensors", framework="pt").get_tensor("logits")
    assert stored.dtype == torch.bfloat16
    places = {place["row"]: place for place in pq.read_table(world / "reference" / "reference.parquet").to_pylist()}
    rows = held_out(world)
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        with torch.inference_mode():
            log_q = model(ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
        predicted = [i for i in range(len(ids) - 1) if row["completion_mask"][i + 1]]
        nll = -sum(log_q[i, ids[i + 1]].item() for i in predicted)
        place = places[row["row"]]
        log_p = stored[place["start"] : place["start"] + place["n"]].double().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q[predicted])).sum().item()
        every = -sum(log_q[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        text = row["answer"].encode()  # the answer is all that is trained here, but for the token that ends it
        counts = {"nll": len(predicted), "kl": place["n"], "nll_all": len(ids) - 1, "bits": len(text)}
        assert counts["nll"] == counts["kl"]
        for metric, value in (("nll", nll), ("kl", kl), ("nll_all", every), ("bits", nll / math.log(2))):
            line = scores[row["row"], metric]
            assert line["n"] == counts[metric]
            assert line["sum"] == pytest.approx(value, rel=0.02)  # bf16 sums differ with the batch: 0.3 % here
        tokens = [line["kl"] for line in lines(tmp_path / "out", "kl") if line["row"] == row["row"]]
        assert sum(tokens) == pytest.approx(scores[row["row"], "kl"]["sum"], rel=1e-5)  # stored as fp32
    assert {key[1] for key in scores} == {*SCORED, "nll_general"}
    assert len(scores) == len(SCORED) * len(rows) + 6
    general = [line for line in scores.values() if line["metric"] == "nll_general"]
    assert {line["split"] for line in general} == {"general"}
    texts = pq.read_table(world / "dataset" / "general.parquet").to_pylist()
    assert sum(line["n"] for line in general) == sum(len(text["input_ids"]) - 1 for text in texts)
    assert curve(make_job("evaluate", tmp_path / "out", params={}), "nll/test") == {0: means["nll/test"]}


def test_rows_in_several_tiles_and_parts_have_the_same_scores(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of seven tokens, fp64 of two: rows are longer, and every piece meets its own tokens of the reference."""
    whole = score(world, tmp_path / "whole")
    token = 2 * refer(world, tmp_path / "reference")["vocabulary"]
    monkeypatch.setattr(tiles, "TILE_BYTES", 7 * token)
    monkeypatch.setattr(teacher_forcing, "PART_BYTES", {"cpu": 2 * 4 * token})
    refer(world, tmp_path / "in-tiles")
    stored = [load_file(tmp_path / name / "reference.safetensors")["logits"] for name in ("reference", "in-tiles")]
    torch.testing.assert_close(
        stored[0], stored[1], rtol=2**-7, atol=1e-5
    )  # a step of bf16; equal where this was written
    inputs = {"kind": "nf4", "adapter": world / "adapter", "reference": tmp_path / "in-tiles"}
    own = score(world, tmp_path / "own", **inputs)
    assert own["kl/dev"] == own["kl/test"] == 0 and own["agree/test"] == 1
    in_tiles = score(world, tmp_path / "out", reference=tmp_path / "in-tiles")
    for metric in (name for name in whole if name not in ("kernel", "computed")):
        assert in_tiles[metric] == pytest.approx(whole[metric], rel=0.02), metric  # as above; equal on AVX2
    for name in ("scores", "kl"):
        same = [[{**line, "sum": 0, "kl": 0} for line in lines(tmp_path / arm, name)] for arm in ("whole", "out")]
        assert same[0] == same[1]


def test_null_arms_compute_otherwise_what_is_the_same_model(world: Path, tmp_path: Path) -> None:
    """Another batch size and another attention are on record, and move losses by less than a hundredth."""
    plain = score(world, tmp_path / "plain")
    batch = score(world, tmp_path / "batch", batch_size=2)
    eager = score(world, tmp_path / "eager", attention="eager")
    record = {"device": "cpu", "attention": "sdpa", "threads": 1, "batch_size": 4}
    record |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    assert plain["computed"] == record == json.loads((tmp_path / "plain" / "computed.json").read_text())
    assert batch["computed"] == record | {"batch_size": 2}
    assert eager["computed"] == record | {"attention": "eager"}

    def losses(name: str) -> dict[str, float]:
        return {line["row"]: line["sum"] for line in lines(tmp_path / name) if line["metric"] == "nll"}

    for name in ("batch", "eager"):
        assert losses(name) == pytest.approx(losses("plain"), rel=0.02)  # as above
    assert losses("batch") != losses("plain")  # otherwise it would be no null arm
    assert losses("eager") != losses("plain")


def test_another_device_than_planned_is_refused_before_anything_is_loaded(world: Path, tmp_path: Path) -> None:
    card = "NVIDIA L4, compute 8.9"
    for planned in ("cpu", f"{card} or cpu"):
        score(world, tmp_path / "out", device=planned)
    with pytest.raises(StageError) as caught:
        score(world, tmp_path / "elsewhere", device=card)
    assert "planned for NVIDIA L4, compute 8.9, and here is cpu" in caught.value.problem.what
    with pytest.raises(StageError, match="planned for"):
        params = {"batch_size": 4, "reference_gib": 4.0, "seed": 0, "device": card}
        inputs = {name: world / name for name in ("dataset", "base", "adapter")}
        reference.run(make_job("reference", tmp_path / "reference", params=params, **inputs))


def test_all_arms_have_the_same_rows_groups_and_tokens(world: Path, tmp_path: Path) -> None:
    score(world, tmp_path / "a")
    score(world, tmp_path / "b", kind="nf4", adapter=world / "adapter")
    same = ("row", "group", "split", "domain", "metric", "n")
    keys = [[tuple(line[name] for name in same) for line in lines(tmp_path / arm)] for arm in ("a", "b")]
    assert keys[0] == keys[1]


def test_kl_and_agreement_see_a_change_that_is_known() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    changed = torch.tensor([[1.0, 2.0, 0.0]])
    p, q = logits.softmax(-1)[0], changed.softmax(-1)[0]
    expected = sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True))
    assert divergence(logits, changed).item() == pytest.approx(expected, rel=1e-6)
    assert divergence(logits, logits + 5).item() == pytest.approx(0, abs=1e-15)  # a constant is no change


def train_to_answer(base: Path, out: Path, rows: list[dict[str, Any]]) -> Path:
    """The base, made to know these rows by heart."""
    shutil.copytree(base, out)
    model = load_bf16(base, device="cpu").float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        for place, inside in enumerate(row["completion_mask"]):
            labels[i, place] = row["input_ids"][place] if inside else -100
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(out)
    return out


def test_answers_are_decoded_to_their_end_and_scored(world: Path, tmp_path: Path) -> None:
    trained = train_to_answer(world / "base", tmp_path / "trained", held_out(world))
    # A base's own generation_config neither ends its answers nor samples them here.
    (trained / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "repetition_penalty": 9.0}))
    means = score(world, tmp_path / "out", model=trained)
    assert means["task/test"] == means["task/dev"] == 1  # by heart
    for answer in lines(tmp_path / "out", "answers"):
        assert answer["answer"] == answer["reference"]  # nothing behind the end of the turn
        assert answer["prompt"].endswith("<|im_start|>assistant\n")
        assert (answer["score"], answer["error"], answer["ending"]) == (1, "", "finished")
    assert means["truncated/test"] == means["truncated/dev"] == 0
    assert score(world, tmp_path / "base")["task/test"] == 0


def test_answers_to_dev_are_left_out_where_nothing_chooses_by_them(world: Path, tmp_path: Path) -> None:
    """Every byte of the rows of test is the same, and every loss and KL of dev; the result says what is not there."""
    trained = train_to_answer(world / "base", tmp_path / "trained", held_out(world)[::2])  # half of the rows by heart
    both = score(world, tmp_path / "both", model=trained)
    test = score(world, tmp_path / "test", model=trained, decoded=["test"])
    for name in ("scores", "answers"):
        tables = [pq.read_table(tmp_path / out / f"{name}.parquet") for out in ("both", "test")]
        of_test = [table.filter(pc.equal(table["split"], "test")) for table in tables]
        assert of_test[0].equals(of_test[1]) and len(of_test[0])
        rest = tables[0].filter(pc.equal(tables[0]["split"], "dev"))
        if name == "scores":
            rest = rest.filter(pc.invert(pc.is_in(rest["metric"], pa.array(DECODED))))
        else:
            rest = rest.slice(0, 0)
        assert tables[1].filter(pc.equal(tables[1]["split"], "dev")).equals(rest)
    assert lines(tmp_path / "both", "kl") == lines(tmp_path / "test", "kl")
    assert 0 < both["task/test"] < 1
    gone = {"task/dev": both["task/dev"], "truncated/dev": both["truncated/dev"]}
    assert test.pop("absent") == dict.fromkeys(gone, NOT_DECODED)
    assert both == test | gone
    told = notes(make_job("evaluate", tmp_path / "test", params={}))["answers"]
    assert NOT_DECODED in told and str(len([row for row in held_out(world) if row["split"] == "test"])) in told


def reference_size(row: dict[str, Any]) -> int:
    """Tokens of the row's answer with the token that ends it."""
    start = len(row["prompt_ids"])
    return row["input_ids"].index(2, start) + 1 - start


def test_an_answer_that_reaches_the_limit_without_an_end_scores_0(world: Path, tmp_path: Path) -> None:
    """Rows of a batch end at other steps; the limit is exactly what the middle ones need, end included."""
    rows = {row["row"]: row for row in held_out(world)}
    trained = train_to_answer(world / "base", tmp_path / "trained", list(rows.values()))
    sizes = {name: reference_size(row) for name, row in rows.items()}
    middle, long = sorted(set(sizes.values()))[-2:]
    (tmp_path / "own.py").write_text("def score(answer, reference, columns):\n    return 1\n")
    all_right = {"kind": "python", "name": "python", "function": "score"}
    for limit, cut in ((middle, {long}), (middle - 1, {middle, long}), (long, set[int]())):
        out = tmp_path / str(limit)
        params = PARAMS | {"max_new_tokens": limit, "scorers": [all_right, EXACT]}
        inputs = {"model": trained, "dataset": world / "dataset", "scorer-0": tmp_path / "own.py"}
        means = evaluate.run(make_job("evaluate", out, params=params, **inputs))
        unended = {name for name, size in sizes.items() if size in cut}
        truncated = {line["row"]: line for line in lines(out) if line["metric"] == "truncated"}
        assert {name for name, line in truncated.items() if line["sum"] == 1} == unended
        assert truncated.keys() == rows.keys() and {line["n"] for line in truncated.values()} == {1}
        for metric in ("task", "task.exact-match"):  # a scorer that says 1 to everything is not asked
            zeros = {line["row"] for line in lines(out) if line["metric"] == metric and line["sum"] == 0}
            assert zeros == unended
        for answer in lines(out, "answers"):
            assert answer["ending"] == ("cut" if answer["row"] in unended else "finished")
            assert answer["error"].startswith("cut off") == (answer["row"] in unended)
            assert answer["reference"].startswith(answer["answer"])
        of_test = [sizes[row["row"]] in cut for row in rows.values() if row["split"] == "test"]
        assert means["truncated/test"] == sum(of_test) / len(of_test)


def test_thinking_that_is_never_closed_is_no_answer(world: Path, tmp_path: Path) -> None:
    """The prompt opens it. One model closes it, the other ends its turn instead, with the right words in it."""
    tokenizer = write_base(tmp_path / "base", chat_template=THINKING)
    said = [{"messages": chat(f"what is {i} ?", f"so\n</think>\n\n{ANSWERS[i % 2]}")} for i in range(60)]
    data = write_jsonl(tmp_path / "rows.jsonl", said)
    prepare.run(make_job("prepare", tmp_path / "dataset", params=PREPARE, data=data, tokenizer=tokenizer))
    rows, open_ended = held_out(tmp_path), []
    for row in rows:
        answer = AutoTokenizer.from_pretrained(tokenizer)(f"{row['answer']}<|im_end|>")["input_ids"]
        mask = [False] * len(row["prompt_ids"]) + [True] * len(answer)
        open_ended.append({"input_ids": row["prompt_ids"] + answer, "completion_mask": mask})
    for name, taught, ending in (("closes", rows, "finished"), ("never", open_ended, "thinking")):
        model = train_to_answer(tokenizer, tmp_path / f"{name}-model", taught)
        inputs = {"model": model, "dataset": tmp_path / "dataset"}
        means = evaluate.run(make_job("evaluate", tmp_path / name, params=PARAMS | {"max_new_tokens": 40}, **inputs))
        answers = lines(tmp_path / name, "answers")
        assert {answer["ending"] for answer in answers} == {ending} and len(answers) == len(rows)
        told = [(answer["answer"].split(), answer["reference"].split()) for answer in answers]
        assert any(said[-1:] == reference[-1:] for said, reference in told)  # a scorer would have found it
        assert (means["task/test"] > 0) == (ending == "finished")
        assert means["truncated/test"] == (ending == "thinking")


def test_an_answer_ends_with_any_of_the_ids_that_end_one(world: Path, tmp_path: Path) -> None:
    """As Gemma has two; here the second one is the first token of every third answer."""
    rows = [row for row in teacher_forcing.read_rows(world / "dataset", "dev", "test") if row.prompt_ids]
    trained = load_bf16(train_to_answer(world / "base", tmp_path / "trained", held_out(world)), device="cpu")
    begins = next(row.ids[len(row.prompt_ids)] for row in rows if row.answer == "blue")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=[2, begins], pad_token_id=0)
    batch = [next(row for row in rows if row.answer == answer) for answer in ANSWERS]
    blue, sky, _ = together = greedy_answers(trained, batch, config)
    assert blue == ([], True)
    assert not sky.ended and len(sky.tokens) == 3
    assert together == [greedy_answers(trained, [row], config)[0] for row in batch]


def test_a_sample_keeps_whole_rows_and_the_same_batches(world: Path, tmp_path: Path) -> None:
    whole = refer(world, tmp_path / "whole")
    token_gib = 2 * whole["vocabulary"] / 2**30  # bf16
    half = refer(world, tmp_path / "half", gib=whole["tokens"] * token_gib / 2)
    assert whole["rows"] == whole["of_rows"] == half["of_rows"] > half["rows"] > 0
    assert half["tokens"] <= whole["tokens"] / 2
    assert "rows of dev and test fit into" in notes(make_job("reference", tmp_path / "half", params={}))["reference"]
    means = score(world, tmp_path / "out", kind="nf4", adapter=world / "adapter", reference=tmp_path / "half")
    assert means["kl/test"] == 0
    sampled = {place["row"] for place in pq.read_table(tmp_path / "half" / "reference.parquet").to_pylist()}
    assert {line["row"] for line in lines(tmp_path / "out") if line["metric"] == "kl"} == sampled
    assert len({line["row"] for line in lines(tmp_path / "out") if line["metric"] == "nll"}) == whole["rows"]
    with pytest.raises(StageError, match="no row's logits fit"):
        refer(world, tmp_path / "none", gib=token_gib / 2)


def test_logits_that_are_not_finite_are_refused_with_the_rows(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world / "base", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="inf or NaN in the logits of 4 rows") as refused:
        score(world, tmp_path / "out", model=broken)
    assert any(row["row"] in refused.value.problem.where for row in held_out(world))


def test_a_reference_answer_that_its_own_scorer_rejects_is_refused(world: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(world / "dataset", dataset)
    rows = pq.read_table(dataset / "rows.parquet").to_pylist()
    for row in rows:
        row |= {"answer": "SELECT 1", "columns": json.dumps({"schema": "library"})}
    next(row for row in rows if row["split"] == "test")["answer"] = "SELECT name FROM nowhere"
    pq.write_table(pa.Table.from_pylist(rows, schema=prepare.ROWS), dataset / "rows.parquet")
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "library.sql").write_text("CREATE TABLE books (name TEXT);")
    job = make_job(
        "evaluate",
        tmp_path / "out",
        params=PARAMS | {"scorers": [{"kind": "sql-execution", "name": "sql-execution", "schema_column": "schema"}]},
        reference=world / "reference",
        model=world / "base",
        dataset=dataset,
        **{"scorer-0": tmp_path / "sql"},
    )
    with pytest.raises(StageError, match="a reference answer does not run"):
        evaluate.run(job)


def test_an_end_that_is_no_special_token_is_cut_off_too() -> None:
    assert before_end([9, 8, 7, 5, 9], [7, 5]) == [9, 8]
    assert before_end([9, 8], [7]) == [9, 8]


def test_bytes_are_those_of_the_counted_text(world: Path) -> None:
    """Two spans, special tokens in both, a character of three bytes that the tokenizer splits."""
    tokenizer = AutoTokenizer.from_pretrained(str(world / "base"))
    ids: list[int] = []
    counted: list[bool] = []
    for text, inside in (
        ("<|im_start|>what ", False),
        ("blue €<|im_end|>", True),
        ("\n?", False),
        (" sky<|im_end|>", True),
    ):
        part = tokenizer(text)["input_ids"]
        ids, counted = [*ids, *part], [*counted, *[inside] * len(part)]
    row = TokenRow(row="r", group="r", split="test", ids=ids, counted=counted)
    assert completion_bytes(row, tokenizer) == len("blue €".encode()) + len(" sky") == 12


def test_completions_without_text_have_no_bits(world: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(world / "dataset", dataset)
    rows = pq.read_table(dataset / "rows.parquet").to_pylist()
    silent = next(row for row in rows if row["split"] == "test")
    silent["completion_mask"] = [
        token == 2 and inside for token, inside in zip(silent["input_ids"], silent["completion_mask"], strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=prepare.ROWS), dataset / "rows.parquet")
    (tmp_path / "base").symlink_to(world / "base")
    (tmp_path / "adapter").symlink_to(world / "adapter")
    refer(tmp_path, tmp_path / "reference")
    score(tmp_path, tmp_path / "out")
    metrics = {line["metric"] for line in lines(tmp_path / "out") if line["row"] == silent["row"]}
    assert metrics == {*SCORED} - {"bits"}


def test_plain_text_has_a_loss_and_no_task(world: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(world / "base")
    (tmp_path / "adapter").symlink_to(world / "adapter")
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"the sky is blue {i}"} for i in range(70)])
    job = make_job("prepare", tmp_path / "dataset", params=PREPARE, data=data, tokenizer=world / "base")
    prepare.run(job)
    refer(tmp_path, tmp_path / "reference")
    job = make_job("evaluate", tmp_path / "out", params=PARAMS, model=world / "base", dataset=tmp_path / "dataset")
    means = score(tmp_path, tmp_path / "out")
    rows = held_out(tmp_path)
    assert {name for name in means if name not in ("kernel", "computed")} == {
        f"{a}/{b}" for a in SCORED if a not in DECODED for b in ("dev", "test")
    }
    assert all(
        one["n"] == len(row["input_ids"]) - 1
        for row in rows
        for one in lines(tmp_path / "out")
        if one["row"] == row["row"] and one["metric"] != "bits"
    )
    assert lines(tmp_path / "out", "answers") == []
    assert notes(job)["task"].startswith(f"{len(rows)} of {len(rows)} rows are plain text")
