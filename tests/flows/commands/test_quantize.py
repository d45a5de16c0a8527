"""`quench quantize`: rows of several forms, exit codes, a manifest beside the files, everything wrong at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.runtime.fingerprint import file_digest
from tasks.runtime.process.launch import CHECKOUT
from tests.jobs.build import write_jsonl
from tests.jobs.quantized import COST, log_probs, mean_kl
from tests.tiny import write_base


def quench(*words: object, folder: Path, check: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "quantize", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "QUENCH_HOME": str(folder / "home")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("quantize-command") / "base")


def texts(path: Path, number: int) -> Path:
    return write_jsonl(path, [{"text": f"the sky {n} is blue and {n * 37} the answer {n % 7}"} for n in range(number)])


def chats(path: Path, number: int) -> Path:
    turns = [(f"what is {n} ?", f"the answer is {n * 31} and {n % 11}") for n in range(number)]
    return write_jsonl(
        path,
        [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in turns
        ],
    )


def test_texts_calibrate_and_nothing_else_is_left(base: Path, tmp_path: Path) -> None:
    rows = texts(tmp_path / "rows.jsonl", 140)
    asked = ("--scheme", "gptq-w4-g32", "--calibration", rows, "--json")
    said = quench(base, tmp_path / "out", *asked, folder=tmp_path, check=0)
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert json.loads(said[said.index("{\n") : said.rindex("}") + 1])["quantized"]["digest"] == manifest["digest"]
    assert "140 rows of 140" in said and "140 of the form text" in said
    for name, one in manifest["files"].items():
        assert file_digest(out / name) == one["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]  # no home was there, none is made
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="bfloat16").eval()
    original = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").eval()
    assert 1e-6 < mean_kl(log_probs(original), log_probs(loaded)) < COST[4]
    AutoTokenizer.from_pretrained(out)
    assert "OUT is not an empty folder" in quench(base, out, "--scheme", "nf4", folder=tmp_path, check=2)
    assert "quantized already" in quench(out, tmp_path / "twice", "--scheme", "nf4", folder=tmp_path, check=2)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int8", "rtn-w3", "awq-w4-g32"])
def test_conversations_and_schemes_without_rows(scheme: str, base: Path, tmp_path: Path) -> None:
    rows = ["--calibration", chats(tmp_path / "rows.jsonl", 150), "--rows", 130] if scheme.startswith("awq") else []
    said = quench(base, tmp_path / "out", "--scheme", scheme, *rows, folder=tmp_path, check=0)
    assert ("130 rows of 150" in said) == bool(rows)
    assert "100% of the linear weights packed" in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == ({"model", "calibset"} if rows else {"model"})
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")


def test_everything_that_is_wrong_is_said_at_once(base: Path, tmp_path: Path) -> None:
    bare = write_base(tmp_path / "bare", chat_template=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    rows = chats(tmp_path / "rows.jsonl", 100)
    asked = ("--scheme", "gptq-w4-g32", "--calibration", rows, "--seq-len", 4096)
    said = quench(bare, tmp_path / "out", *asked, folder=tmp_path, check=2)
    for part in ("not an empty folder", "100 are there", "the model ends at 512", "no chat template"):
        assert part in said
    assert (
        "no calibration rows"
        in quench(base, tmp_path / "o", "--scheme", "awq-w4-g32", folder=tmp_path, check=2).lower()
    )
    assert "does not make" in quench(
        base, tmp_path / "o", "--scheme", "nf4", "--backend", "autoawq", folder=tmp_path, check=2
    )
    assert not (tmp_path / "o").exists()


def test_too_few_tokens_are_told_in_the_words_of_the_command(base: Path, tmp_path: Path) -> None:
    """The widest layer has 256 inputs, so 1,024 tokens are needed; 128 rows of 4 give 512."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{n:03d}a"} for n in range(300)])
    asked = ("--scheme", "gptq-w4-g32", "--calibration", rows, "--rows", 128)
    said = quench(base, tmp_path / "out", *asked, folder=tmp_path, check=1)
    assert "calibration tokens; 1024 are needed" in said and re.search(
        r"where: --rows\n[\s\S]*give --rows 2[5-7]\d", said
    )
    assert not (tmp_path / "out").exists()
