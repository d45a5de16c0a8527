"""Packed rows: no token attends into another row, the curve is that of the rows alone, and there is no padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tasks.jobs import prepare, train
from tasks.jobs.loading.load import load_nf4
from tasks.jobs.training.packing import LIMIT, check_packing, packing_error
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.launch import CHECKOUT
from tests.jobs.build import curve, make_job, notes
from tests.jobs.test_prepare import PARAMS
from tests.jobs.test_train import job_for
from tests.jobs.whole_models import write_whole
from tests.tiny import write_base

COLLATE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def rows(*lengths: int) -> list[dict[str, list[int]]]:
    """Random token ids."""
    torch.manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in (torch.randint(4, 300, (n,)).tolist() for n in lengths)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_no_token_attends_into_another_row(tmp_path: Path, architecture: str, attention: str):
    model = load_nf4(write_base(tmp_path, architecture=architecture), device="cpu", attention=attention)
    adapted = train.add_adapter(model, job_for(tmp_path / "out", tmp_path, tmp_path).params)
    assert check_packing(adapted, rows(30, 50, 7), collate=COLLATE) < LIMIT
    first, second = rows(30, 50)
    other = {**first, "input_ids": first["input_ids"][::-1]}

    def last_row(one: dict[str, list[int]]) -> torch.Tensor:
        batch = COLLATE([one, second])
        with torch.no_grad():
            return adapted.eval()(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits[0, 30:]

    # Other tokens before it, the same logits, to the last bit: masked scores weigh exactly 0.
    assert torch.equal(last_row(first), last_row(other))


def test_the_check_refuses_rows_that_see_each_other(tmp_path: Path):
    """Without positions that start again, transformers makes one row of them: what the check is there for."""
    model = load_nf4(write_base(tmp_path), device="cpu")
    adapted = train.add_adapter(model, job_for(tmp_path / "out", tmp_path, tmp_path).params)

    def leaking(some: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = COLLATE(some)
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    assert packing_error(adapted, rows(30, 50), collate=leaking) > 2 * LIMIT
    with pytest.raises(StageError, match="packed rows"):
        check_packing(adapted, rows(30, 50), collate=leaking)


def test_layers_that_cannot_keep_rows_apart_are_refused(tmp_path: Path):
    """Linear attention does so only by a kernel that is not among our packages."""
    model = load_nf4(write_whole(tmp_path, "qwen3.5-whole"), device="cpu")
    adapted = train.add_adapter(model, job_for(tmp_path / "out", tmp_path, tmp_path).params)
    with pytest.raises(StageError, match="does not take packed rows") as refused:
        check_packing(adapted, rows(30, 50), collate=COLLATE)
    assert refused.value.problem.next == "set train.packing: false"


def test_a_packed_training_has_the_curve_of_the_unpacked_one(base: Path, dataset: Path, tmp_path: Path):
    alone = job_for(tmp_path / "alone", base, dataset, dropout=0.0, max_steps=4, eval_steps=2)
    packed = job_for(tmp_path / "packed", base, dataset, dropout=0.0, max_steps=4, eval_steps=2, packing=True)
    first, second = train.run(alone), train.run(packed)
    for name in ("train/loss", "train/dev_loss"):
        # bf16 sums in another order, as with accumulation; a row that sees another changes the loss by 1e-2.
        assert curve(packed, name) == pytest.approx(curve(alone, name), rel=5e-4)
    assert second["tokens"] == first["tokens"]
    assert second["padding_share"] == 0 < 0.2 < first["padding_share"]
    assert "alone" in notes(packed)["packing"]


def test_padding_of_the_quickstarts_rows_is_below_3_percent_packed(tmp_path: Path):
    quickstart = CHECKOUT / "recipes" / "quickstart"
    lines = (quickstart / "data" / "sql.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    dataset = tmp_path / "dataset"
    prepare.run(make_job("prepare", dataset, params=PARAMS, data=data, tokenizer=quickstart / "base"))
    shares = {}
    for packing in (False, True):
        job = job_for(
            tmp_path / f"out-{packing}", quickstart / "base", dataset, max_steps=1, batch_size=16, packing=packing
        )
        shares[packing] = train.run(job)["padding_share"]
    assert shares[True] <= 0.03 < shares[False]
