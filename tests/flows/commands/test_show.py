"""`quench show`: every shape of rows with the right value, from the cases that docs/data.md is made of."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli import main
from flows.commands.data_page import Case, chapters, marked, refusal
from flows.commands.show import load_checked, show_job
from recipes.problem import RecipeError
from tasks.jobs import prepare
from tasks.jobs.show import run
from tasks.runtime.process.errors import StageError
from tests.hub import Hub
from tests.jobs.build import make_job, write_jsonl
from tests.jobs.text.templates import CHATML, PROMPT
from tests.tiny import MARKED, PLAIN, write_base

CASES = [case for chapter in chapters() for case in chapter.cases]
TURN = "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
THINKING = (  # has a place for reasoning
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.reasoning_content -%}{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}" + PROMPT
)
EMPTY = "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}"
OPENS_THINKING = (  # when it asks for an answer, unless it is told not to think
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}" + EMPTY + "{%- endif -%}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    + EMPTY
    + "{%- else -%}{{- '<think>\n' -}}{%- endif -%}{%- endif -%}"
)
TEMPLATES = {
    "tools": CHATML.template,
    "bos": CHATML.template,
    "plain": PLAIN,
    "marked": MARKED,
    "developer": "{%- for m in messages -%}{%- if m.role == 'developer' -%}"
    "{{- '<|im_start|>developer\n' + m.content + '<|im_end|>\n' -}}{%- else -%}" + TURN + "{%- endif -%}"
    "{%- endfor -%}" + PROMPT,
    "without-system": "{%- for m in messages if m.role not in ('system', 'developer') -%}"
    + TURN
    + "{%- endfor -%}"
    + PROMPT,
    "thinking": THINKING,
    "opens-thinking": OPENS_THINKING,
    "dated": "{{- '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' -}}"
    "{%- for m in messages -%}" + TURN + "{%- endfor -%}" + PROMPT,
}
Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Base folders by the name of their template; each is written once."""
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        if not (folder / name).exists():
            write_base(folder / name, chat_template=TEMPLATES[name], bos=name == "bos")
            config = folder / name / "config.json"  # a character is about a token here
            config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))
        return folder / name

    return base


def write_recipe(folder: Path, base: Path, **sections: dict[str, Any]) -> Path:
    """A recipe with these fields of `model` and `data`."""
    model = {"base": str(base), **sections.get("model", {})}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "shown", "model": model, "data": sections["data"]}), encoding="utf-8")
    return path


def shown(recipe: Path, folder: Path, **which: Any) -> list[dict[str, Any]]:
    """What `quench show --json` prints, by the same job in this process.

    Raises:
        RecipeError: As of the command.
        StageError: What the command prints as a refusal.
    """
    job = show_job(load_checked(recipe), folder / "work", **which)
    run(job)
    return json.loads((job.out / "shown.json").read_text(encoding="utf-8"))


def zstd(text: str) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as packed:
        packed.write(text.encode())
    return out.getvalue().to_pybytes()


def write_files(case: Case, folder: Path) -> None:
    """The case's files, in its form."""
    packed: dict[str, Callable[[str], bytes]] = {
        "plain": str.encode,
        "gz": lambda text: gzip.compress(text.encode()),
        "xz": lambda text: lzma.compress(text.encode()),
        "zst": zstd,
        "bom": lambda text: text.encode("utf-8-sig"),
        "crlf": lambda text: text.replace("\n", "\r\n").encode(),
        "utf-16": lambda text: text.encode("utf-16"),
        "latin-1": lambda text: text.encode("latin-1"),
    }
    for path, text in case.texts().items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if case.form in packed:
            file.write_bytes(packed[case.form](text))
            continue
        rows = [json.loads(line) for line in text.splitlines()]
        if case.form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            assert case.form == "arrow"
            datasets.Dataset.from_list(rows).save_to_disk(file)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_shape_has_the_right_value(case: Case, bases: Bases, tmp_path: Path):
    write_files(case, tmp_path)
    recipe = write_recipe(tmp_path, bases(case.base), model=dict(case.model), data={"path": case.file, **case.data})
    if case.error:
        with pytest.raises((RecipeError, StageError)) as refused:
            shown(recipe, tmp_path, row=case.row)
        said = str(refused.value).replace(date.today().isoformat(), "2025-05-01").replace(f"{tmp_path}/", "")
        assert all(word in said for word in case.error), said
        assert case.said.strip() in said
        return
    (entry,) = shown(recipe, tmp_path, row=case.row)
    if case.left_out:
        assert entry["left_out"] == case.left_out
        return
    expected = {"cut_turns": 0, "left_out": None} | dict(case.expected)
    names = [tool["function"]["name"] for tool in entry["tools"]] if entry["tools"] else []
    assert names == expected.pop("tools", [])
    assert {name: entry[name] for name in expected} == expected
    assert entry["source"].endswith(case.row)
    check_consistency(entry)
    text = "".join(f"⟦{part}⟧" if trained else part for part, trained in entry["parts"])
    assert marked(case) in text  # the page shows what is so


def check_consistency(entry: dict[str, Any]) -> None:
    """What holds for every sample, whatever its shape."""
    assert len(entry["trained"]) == len(entry["input_ids"]) > 0
    assert "".join(text for text, _ in entry["parts"]) == entry["text"]
    assert [text for text, trained in entry["parts"] if trained] == entry["trained_text"]
    assert entry["text"].startswith(entry["prompt"])
    assert 0 < sum(entry["trained"]) <= len(entry["trained"])


def test_cases_are_many_and_every_one_has_what_is_right():
    assert len(CASES) > 120 and len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        if not case.error and not case.left_out:
            assert {"trained_text", "prompt", "answer"} <= case.expected.keys(), case.name
    assert {case.base for case in CASES} == TEMPLATES.keys()


def test_the_page_has_a_refusal_for_every_case_that_is_refused():
    for case in CASES:
        if case.error and case.shown:
            said = refusal(case)
            assert all(word in said for word in case.error), f"{case.name}: {said or 'give the case its `said`'}"


# ---- finding rows


@pytest.fixture
def project(bases: Bases, tmp_path: Path) -> Path:
    """A recipe with 40 questions, each asked for two customers, and one row twice."""
    rows = [
        {"prompt": f"Where is parcel {number}?", "completion": f"In Hamburg, shelf {number} {who}.", "who": who}
        for number in range(40)
        for who in ("Ann", "Bob")
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[3]])
    return write_recipe(tmp_path, bases("tools"), data={"path": "rows.jsonl", "domain": "who"})


def test_the_rows_of_a_split_are_those_of_the_dataset(project: Path, tmp_path: Path):
    """Every row that prepare writes, with the same tokens, in the order of the file; and no other."""
    loaded = load_checked(project)
    job = show_job(loaded, tmp_path / "params")
    inputs = {name: origin.path for name, origin in job.inputs.items()}
    made = make_job("prepare", tmp_path / "made", params=job.params, **inputs)
    prepare.run(made)
    records = {record["row"]: record for record in pq.read_table(made.out / "rows.parquet").to_pylist()}
    entries = [
        entry
        for split in ("train", "dev", "test")
        for entry in shown(project, tmp_path / split, split=split, count=1000)
    ]
    assert len(entries) == 80 and {entry["row"] for entry in entries} == records.keys()
    for entry in entries:
        record = records[entry["row"]]
        assert entry["input_ids"] == record["input_ids"] and entry["source"] == record["source"]
        assert entry["trained"] == [int(inside) for inside in record["completion_mask"]]
        for name in ("split", "group", "domain", "answer"):
            assert entry[name] == record[name], name
    lines = [int(entry["source"].split(":")[1]) for entry in entries if entry["split"] == "train"]
    assert lines == sorted(lines)
    assert len({entry["group"] for entry in entries}) == 40  # the two answers to a question stay together


def test_reading_stops_at_the_last_row_that_is_shown(project: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + "not json\n")
    assert len(shown(project, tmp_path / "first", count=2)) == 2
    with pytest.raises(StageError, match=r"rows.jsonl:82 is not JSON"):
        shown(project, tmp_path / "all", count=1000)


def test_a_row_is_found_by_its_place_its_name_and_the_beginning_of_it(project: Path, tmp_path: Path):
    (by_place,) = shown(project, tmp_path / "1", row="rows.jsonl:5")
    assert by_place["source"] == "rows.jsonl:5" and by_place["left_out"] is None
    assert shown(project, tmp_path / "2", row=by_place["row"]) == [by_place]
    assert by_place in shown(project, tmp_path / "3", row=by_place["row"][:6])
    assert shown(project, tmp_path / "4", row=f"{tmp_path}/rows.jsonl:5") == [by_place]
    (twin,) = shown(project, tmp_path / "5", row="rows.jsonl:81")
    assert twin["left_out"] == "equals rows.jsonl:4, which stays"
    with pytest.raises(StageError, match=r"there is no row rows.jsonl:500"):
        shown(project, tmp_path / "6", row="rows.jsonl:500")


def test_a_near_duplicate_that_is_removed_says_so(bases: Bases, tmp_path: Path):
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    rows = [
        {"prompt": f"{words} {words.upper()} {words.title()} a b c d e", "completion": text} for text in ("x y", "x z")
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "And now?", "completion": "Another one."}])
    data = {"path": "rows.jsonl", "near_duplicates": "remove", "near_duplicate_jaccard": 0.8, "dev": 0.01, "test": 0.01}
    recipe = write_recipe(tmp_path, bases("tools"), data=data)
    reasons = [shown(recipe, tmp_path / str(line), row=f"rows.jsonl:{line}")[0]["left_out"] for line in (1, 2, 3)]
    assert sum(bool(reason) for reason in reasons[:2]) == 1 and reasons[2] is None
    assert any(reason and "almost equal" in reason for reason in reasons)


def test_two_sources_are_told_apart(bases: Bases, tmp_path: Path):
    for name in ("shop", "garden"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", [{"prompt": f"Hello {name}?", "completion": f"Hello from {name}."}])
    sources = [{"path": f"{name}/rows.jsonl", "domain": name} for name in ("shop", "garden")]
    recipe = write_recipe(tmp_path, bases("tools"), data={"sources": sources})
    (entry,) = shown(recipe, tmp_path, row="garden/rows.jsonl:1")
    assert entry["domain"] == "garden" and entry["answer"] == "Hello from garden."


# ---- the command


def test_the_command_prints_what_the_job_makes(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    expected = shown(project, tmp_path / "here", row="rows.jsonl:5")
    capsys.readouterr()  # what the job notes goes to its log
    assert main(["show", str(project), "--row", "rows.jsonl:5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == [{name: value for name, value in entry.items() if name != "parts"} for entry in expected]


def test_without_colour_the_trained_part_is_in_brackets(project: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(project), "-n", "2", "--set", "data.domain=who"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^⟦In Hamburg, shelf \d+ (Ann|Bob)\.<\|im_end\|>⟧$", printed, flags=re.MULTILINE)) == 2
    assert re.search(r"rows\.jsonl:\d+  row [0-9a-f]{16}  train  group [0-9a-f]{16}  domain (Ann|Bob)", printed)
    assert re.search(r"\d+ tokens, \d+ of them trained", printed)


def test_a_refusal_has_four_parts_and_the_exit_code_of_bad_input(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + '{"prompt": "And?", "completion": " ", "who": "Ann"}\n')
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["show", str(project), "--row", "rows.jsonl:82", "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["where"] == "rows.jsonl:82" and "empty assistant turn" in problem["why"]
    assert not list(tmp_path.glob("quench-show-*"))


def test_a_base_on_a_hub_is_read_without_its_weights(bases: Bases, tmp_path: Path):
    """In a process of its own: huggingface_hub reads the address when it is imported."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hello?", "completion": "Hello."}])
    with Hub() as hub:
        hub.add("org/base", bases("tools"))
        recipe = write_recipe(tmp_path, Path("org/base"), data={"path": "rows.jsonl"})
        code = (
            "import sys; from flows.pins import row_pins; from flows.commands.show import load_checked; "
            "from pathlib import Path; print(row_pins(load_checked(Path(sys.argv[1]))).tokenizer.path)"
        )
        words = [sys.executable, "-c", code, str(recipe)]
        done = subprocess.run(words, env=hub.env(tmp_path / "hub"), capture_output=True, text=True, check=True)
    names = {path.name for path in Path(done.stdout.strip()).iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
