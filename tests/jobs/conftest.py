"""A tiny base, a dataset of uneven rows to train on, and a calibration set of random tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.jobs import prepare
from tasks.jobs.loading.bf16 import lacks_bf16, use_fp32_products
from tests.jobs.build import make_job, write_jsonl
from tests.jobs.quantized import write_calibset
from tests.jobs.test_prepare import PARAMS, chat, questions
from tests.tiny import write_base

if lacks_bf16():  # from the first test on, not from the first job: what a test computes itself is compared with a job's
    use_fp32_products()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    uneven = [{"messages": chat(f"say {i}", f"{i} " * (1 + i % 20))} for i in range(40)]
    data = write_jsonl(folder / "rows.jsonl", questions(40) + uneven)
    prepare.run(make_job("prepare", folder / "dataset", params=PARAMS, data=data, tokenizer=base))
    return folder / "dataset"


@pytest.fixture(scope="module")
def calibset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibset(tmp_path_factory.mktemp("calibset") / "calibset")
