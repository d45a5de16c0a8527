"""Folders: which of their files hold the rows that are meant, and how a configuration and a split are asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from flows.commands.init_data import read_data
from flows.pins import pin
from flows.plan.row_sizes import data_bytes
from recipes.checks.check import check, check_data
from recipes.data.files import FolderChoice, data_files, raw_rows
from recipes.data.origin import Origin
from recipes.data.rows import read_origin
from recipes.problem import RecipeError
from recipes.read.load import load
from tasks.jobs.text.plain_texts import read_texts
from tasks.runtime.process.errors import StageError
from tests.recipes.folders import chat, write_project, write_rows

ROW = '{"text": "x"}\n'


def folder(root: Path, *names: str) -> Path:
    """A folder of files with one row each; a row says which file it is of."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}) + "\n")
    return root


def names(root: Path, **choice: str) -> list[str]:
    return [file.relative_to(root).as_posix() for file in data_files(root, **choice)]


def choice(root: Path, **chosen: str) -> FolderChoice:
    with pytest.raises(FolderChoice) as refused:
        data_files(root, **chosen)
    return refused.value


@pytest.mark.parametrize(
    ("files", "right"),
    [
        (["rows.jsonl", "more/rows.csv", "LICENSE.txt", "notes.txt"], ["more/rows.csv", "rows.jsonl"]),
        (["a.txt", "b/c.TXT.gz", "README.txt", "licence-MIT.txt", "requirements.txt"], ["a.txt", "b/c.TXT.gz"]),
        (["README.md", "LICENSE.txt", "requirements-dev.txt"], []),
        ([".cache/train.jsonl", "a/.hidden.jsonl", "x.jsonl"], ["x.jsonl"]),
        (["train.jsonl", "test.jsonl", "dev.jsonl.zst"], ["train.jsonl"]),
        (["train_math.jsonl", "train_code.jsonl", "test.jsonl"], ["train_code.jsonl", "train_math.jsonl"]),
        (["Training-01.csv", "training-02.csv", "eval.csv"], ["Training-01.csv", "training-02.csv"]),
        (["2026-01/a.jsonl", "2026-02/a.jsonl"], ["2026-01/a.jsonl", "2026-02/a.jsonl"]),
        (["validation.jsonl"], ["validation.jsonl"]),
        (["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"], None),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], None),
        (["testimonials.jsonl", "development.jsonl", "values.jsonl"], None),
        (["validation/train-tasks.jsonl", "train/test-tasks.jsonl"], ["train/test-tasks.jsonl"]),
        (["train/en/a.jsonl", "train/fr/a.jsonl", "test/en/a.jsonl"], ["train/en/a.jsonl", "train/fr/a.jsonl"]),
    ],
)
def test_files_that_are_meant_without_a_word(tmp_path: Path, files: list[str], right: list[str] | None):
    assert names(folder(tmp_path, *files)) == (sorted(files) if right is None else right)


def test_splits_are_asked_for_by_name(tmp_path: Path):
    files = ["test.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"]
    root = folder(tmp_path, *files)
    asked = choice(root)
    assert (asked.field, asked.names) == ("split", ["test", "validation"])
    assert asked.problem("rows").next == "Write `data.split: test`, or another one of these."
    assert names(root, split="validation") == files[1:2] and names(root, split="test") == sorted([files[0], files[2]])
    assert (
        "test, validation" in choice(root, split="train").why and "no split `train`" in choice(root, split="train").what
    )
    folder(root, "data/train-00000-of-00001.jsonl")
    assert names(root) == ["data/train-00000-of-00001.jsonl"] and names(root, split="test") == sorted(
        [files[0], files[2]]
    )


def test_files_beside_a_split_that_name_none(tmp_path: Path):
    asked = choice(folder(tmp_path, "rows.jsonl", "test.jsonl"))
    assert asked.names == ["test"] and "rows.jsonl" in asked.why
    assert names(tmp_path, split="test") == ["test.jsonl"]


def test_train_splits_of_a_hub_that_are_not_one(tmp_path: Path):
    root = folder(
        tmp_path,
        "data/train_sft-00000-of-00001.parquet",
        "data/train_gen-00000-of-00002.parquet",
        "data/test_sft.parquet",
    )
    assert choice(root).names == ["train_gen", "train_sft"]
    assert names(root, split="train_sft") == ["data/train_sft-00000-of-00001.parquet"]
    folder(root, "data/train-00000-of-00001.parquet")
    assert names(root) == ["data/train-00000-of-00001.parquet"]


def test_configurations_are_folders_with_splits(tmp_path: Path):
    files = ["en/train-00000-of-00001.jsonl", "en/test.jsonl", "fr/train/0.jsonl", "stats.json"]
    root = folder(tmp_path, *files)
    asked = choice(root)
    assert (asked.field, asked.names) == ("config", ["en", "fr"])
    assert asked.problem("rows", written="source").next.startswith("Write `config: en` in this entry of data.sources")
    assert names(root, config="en") == files[:1] and names(root, config="fr") == files[2:3]
    assert names(root, config="en", split="test") == files[1:2]
    assert "en, fr" in choice(root, config="de").why
    assert choice(root, config="fr", split="test").names == ["train"]
    folder(root, "data/train.jsonl")
    assert choice(root).names == ["default", "en", "fr"] and names(root, config="default") == ["data/train.jsonl"]


def test_choices_where_there_is_nothing_to_choose(tmp_path: Path):
    root = folder(tmp_path, "rows.jsonl")
    assert choice(root, config="en").problem("x").next == "Remove `data.config`."
    assert choice(root, split="train").problem("x").next == "Remove `data.split`."
    assert "in a file" in choice(root / "rows.jsonl", split="train").what


def test_a_name_of_many_configurations_is_short(tmp_path: Path):
    root = folder(tmp_path, *(f"c{number:03}/train.jsonl" for number in range(300)))
    assert choice(root).why.endswith("c018, c019 and 280 more.")


CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: ["en/part-*.jsonl", "extra/a.jsonl"]
  - split: held_out
    path: en/held.jsonl
- config_name: 2020
  data_files: "old/**/*.jsonl"
- config_name: all
  default: true
  data_dir: big
- config_name: listed
  data_files: [./extra/a.jsonl, old/x/b.jsonl]
---
# Rows
"""


def test_what_the_card_of_a_data_set_declares(tmp_path: Path):
    files = ["en/part-1.jsonl", "en/part-2.jsonl", "en/sub/part-3.jsonl", "en/held.jsonl", "extra/a.jsonl"]
    root = folder(tmp_path, *files, "old/x/b.jsonl", "old/c.jsonl", "big/train.jsonl", "big/test.jsonl")
    (root / "README.md").write_text(CARD)
    assert choice(root).names == ["2020", "all", "en", "listed"]
    assert names(root, config="en") == ["en/part-1.jsonl", "en/part-2.jsonl", "extra/a.jsonl"]
    assert names(root, config="en", split="held_out") == ["en/held.jsonl"]
    assert names(root, config="2020") == ["old/c.jsonl", "old/x/b.jsonl"]
    assert names(root, config="all") == ["big/train.jsonl"] and names(root, config="all", split="test") == [
        "big/test.jsonl"
    ]
    assert names(root, config="listed") == ["extra/a.jsonl", "old/x/b.jsonl"]
    assert choice(root, config="fr").names == ["2020", "all", "en", "listed"]
    assert [row.where for row in raw_rows(root, config="listed")] == ["extra/a.jsonl:1", "old/x/b.jsonl:1"]


@pytest.mark.parametrize(
    "card",
    [
        "no front matter",
        "---\nconfigs: [\n---\n",
        "---\nconfigs: 3\n---\n",
        "---\nlicense: mit\n---\n",
        "---\n- a\n---\n",
        "---\nconfigs: [{config_name: x}]\n---\n",
        "---\nconfigs: [{config_name: a, data_files: 'gone/*.jsonl'}, 7]\n---\n",
        "---\nconfigs: [{config_name: a, data_files: '../*.jsonl'}, {data_files: '**.jsonl'}]\n---\n",
    ],
)
def test_a_card_that_declares_nothing(tmp_path: Path, card: str):
    root = folder(tmp_path, "train.jsonl", "test.jsonl")
    (root / "README.md").write_text(card)
    assert names(root) == ["train.jsonl"]


def test_one_configuration_on_the_card_is_meant(tmp_path: Path):
    root = folder(tmp_path, "train.jsonl", "raw/a.jsonl")
    (root / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: raw/*.jsonl\n---\n")
    assert names(root) == names(root, config="default") == ["raw/a.jsonl"]


# ---- what `datasets` writes


def saved(root: Path) -> dict[str, Any]:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    data = datasets.Dataset.from_list([{"messages": turns, "kind": "a"}, {"messages": turns[:1], "kind": None}] * 3)
    data.save_to_disk(root / "one", num_shards=2)
    more = {"train": data, "my_split": data.select([1]), "test": data.select([0])}
    datasets.DatasetDict(more).save_to_disk(root / "several")
    return {"messages": [{"role": "user", "content": "x", "tool_calls": None}, turns[1]], "kind": "a"}


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path):
    first = saved(tmp_path)
    rows = list(raw_rows(tmp_path / "one"))
    assert [row.where for row in rows][2:4] == ["data-00000-of-00002.arrow#3", "data-00001-of-00002.arrow#1"]
    assert rows[0].values == first and rows[1].values == {"messages": first["messages"][:1]} and len(rows) == 6
    for left in ("data-00000-of-00003.arrow", "cache-1234.arrow"):  # of an earlier call, and of a map
        (tmp_path / "one" / left).write_bytes((tmp_path / "one" / "data-00000-of-00002.arrow").read_bytes())
    assert len(list(raw_rows(tmp_path / "one"))) == 6
    several = tmp_path / "several"
    assert len(list(raw_rows(several))) == 6 and len(list(raw_rows(several, split="my_split"))) == 1
    assert choice(several, split="dev").names == ["my_split", "test", "train"]


# ---- one verdict, wherever a folder is looked at


def test_the_same_verdict_in_check_plan_and_run(tmp_path: Path):
    recipe = write_project(tmp_path)
    for config in ("en", "fr"):
        (tmp_path / "rows" / config).mkdir(parents=True)
        write_rows(tmp_path / "rows" / config / "train.jsonl", (chat(number, kind=config) for number in range(260)))
    loaded = load(recipe, sets=["data.path=rows"])
    problems = [*check(loaded), *read_origin(Origin(path=tmp_path / "rows")).problems]
    assert [problem.next for problem in problems] == ["Write `data.config: en`, or another one of these."] * 2
    assert check_data(loaded).summary["rows"] == 0  # `check` says why
    assert read_data(tmp_path / "rows").rows.problems == problems[1:]
    assert len(read_data(tmp_path / "rows", sets=["data.config=fr"]).rows.rows) == 260
    with pytest.raises(RecipeError) as refused:
        pin(loaded, tmp_path / "home")
    assert refused.value.problems[0].next == problems[0].next
    assert "recipe.yaml" in refused.value.problems[0].where or "--set" in refused.value.problems[0].where

    chosen = load(recipe, sets=["data.path=rows", "data.config=fr"])
    assert check(chosen) == [] and check_data(chosen).problems == []
    rows = [row for origin in chosen.origins.values() for row in read_origin(origin).rows]
    assert {row.columns["kind"] for row in rows} == {"fr"} and len(rows) == 260
    digest = pin(chosen, tmp_path / "home").data[0].digest
    write_rows(tmp_path / "rows" / "en" / "train.jsonl", [chat(1)])
    assert pin(chosen, tmp_path / "home").data[0].digest == digest  # what is not read is not the data
    write_rows(tmp_path / "rows" / "fr" / "train.jsonl", [chat(1)])
    assert pin(chosen, tmp_path / "home").data[0].digest != digest


def test_general_text_in_a_folder(tmp_path: Path):
    recipe = write_project(tmp_path)
    folder(tmp_path / "texts", "train.jsonl", "test.jsonl")
    loaded = load(recipe, sets=["data.general=texts"])
    assert check(loaded) == [] and [text for _, text in read_texts(tmp_path / "texts", what="x")] == ["train.jsonl"]
    pinned = pin(loaded, tmp_path / "home").general
    assert pinned is not None and pinned.path == tmp_path / "texts"
    (tmp_path / "texts" / "train.jsonl").unlink()
    folder(tmp_path / "texts", "dev.jsonl")
    (problem,) = check(loaded)
    assert "no split `train`" in problem.what and problem.next == "Name the file, or the folder, that is meant."
    with pytest.raises(StageError, match="no split `train`"):
        list(read_texts(tmp_path / "texts", what="x"))
    with pytest.raises(RecipeError, match="no split `train`"):
        pin(loaded, tmp_path / "home")


def test_general_text_without_a_text_is_named_by_its_place(tmp_path: Path):
    recipe = write_project(tmp_path)
    (tmp_path / "general.csv").write_text('text,x\n"one\nline",1\n,2\nthree,3\n"  ",4\n')
    loaded = load(recipe, sets=["data.general=general.csv"])
    assert check(loaded) == []  # the first row is good
    (problem,) = check_data(loaded).problems
    assert problem.where.endswith("general.csv:4") and "has nothing as `text`" in problem.why
    with pytest.raises(StageError, match=r"general\.csv:4"):
        list(read_texts(tmp_path / "general.csv", what="x"))
    (tmp_path / "general.csv").write_text('text\n" "\n')
    assert "is empty" in check(loaded)[0].what


def test_a_compressed_file_is_no_hub_id(tmp_path: Path):
    recipe = write_project(tmp_path)
    rows = "".join(json.dumps(chat(number)) + "\n" for number in range(260)).encode()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows))
    loaded = load(recipe, sets=["data.path=rows.jsonl.gz"])
    assert check(loaded) == [] and check_data(loaded).problems == []
    assert load(recipe, sets=["data.path=org/rows.jsonl.gz"]).data == [tmp_path / "org" / "rows.jsonl.gz"]
    assert data_bytes(loaded.origins["data.path"], []) == len(rows)
