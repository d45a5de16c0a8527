"""Thinking templates and dates: an answer is decoded from what was trained, today and on a rebuild."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path

import pytest

from tasks.jobs import prepare
from tasks.jobs.measuring.grading import Prompting
from tasks.jobs.measuring.own_tokenizer import another
from tasks.jobs.measuring.teacher_forcing import read_rows
from tasks.jobs.text.chat_template import TemplateSettings
from tasks.jobs.text.rendering import Renderer
from tasks.runtime.process.errors import StageError
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_prepare import PARAMS, chat, table
from tests.jobs.text.templates import CHATML
from tests.jobs.text.test_forms import turns_as
from tests.jobs.text.test_rendering import samples_of, spans
from tests.tiny import END, write_base

ROWS = [{"messages": chat(f"what is {i} ?", f"it is {i}")} for i in range(60)]


def template(prompt: str, *, marked: bool) -> str:
    """ChatML whose generation prompt goes on with `prompt`, a Jinja expression; with markers or without."""
    text = "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
    answer = "{%- generation -%}" + text + "{%- endgeneration -%}" if marked else text
    turn = "{%- if m.role == 'assistant' -%}" + answer + "{%- else -%}" + text + "{%- endif -%}"
    opened = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' + (" + prompt + ") -}}{%- endif -%}"
    return "{%- for m in messages -%}" + turn + "{%- endfor -%}" + opened


def prepared(folder: Path, jinja: str, **params: object) -> Path:
    base = write_base(folder / "base", chat_template=jinja)
    data = write_jsonl(folder / "rows.jsonl", ROWS)
    job = make_job("prepare", folder / "out", params=PARAMS | params, data=data, tokenizer=base)
    prepare.run(job)
    return folder / "out"


OPENED = {
    "enable_thinking: false": "'' if enable_thinking is defined and not enable_thinking else '<think>\n'",
    "enable_thinking: true": "'' if enable_thinking else '<think>\n'",
    "thinking: false": "'' if thinking is defined and not thinking else '<think>\n'",
}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("args", OPENED)
def test_a_prompt_that_was_not_trained_is_refused_with_what_makes_it_equal(
    args: str, marked: bool, tmp_path: Path
) -> None:
    jinja = template(OPENED[args], marked=marked)
    with pytest.raises(StageError, match=rf"write `template_args: {{{args}}}` under `model:`") as error:
        prepared(tmp_path, jinja)
    assert "rows.jsonl:1 turn 2: it" in str(error.value)
    name, value = args.split(": ")
    dataset = prepared(tmp_path / "with", jinja, template_args={name: value == "true"})
    for row in table(dataset):
        assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    kept = json.loads((dataset / "tokenizer" / "chat_template_args.json").read_text())
    assert kept == {"template_args": {name: value == "true"}, "template_date": None}


def test_where_no_argument_helps_the_difference_is_shown(tmp_path: Path) -> None:
    with pytest.raises(StageError) as error:
        prepared(tmp_path, template("'<think>\n'", marked=True))
    assert re.search(r"the prompt has '.*<\|im_start\|>assistant\\n<think>\\n' where", str(error.value))
    assert re.search(r"where '.*<\|im_start\|>assistant\\nit is \d+<\|im_end\|>\\n' is trained", str(error.value))


def test_arguments_reach_rows_and_prompts(tmp_path: Path) -> None:
    jinja = turns_as("{{- ('/no_think ' if enable_thinking is false and m.role == 'user') -}}{{- m.content -}}")
    dataset = prepared(tmp_path, jinja, template_args={"enable_thinking": False})
    tokenizer = Renderer.open(dataset / "tokenizer").tokenizer
    for row in table(dataset):
        assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user\n/no_think what is")
        assert tokenizer.decode(row["prompt_ids"]).startswith("<|im_start|>user\n/no_think what is")


TODAY = turns_as("{{- m.content -}}", head="{{- 'It is ' + strftime_now('%d %b %Y') + '.\n' -}}")


def test_a_template_that_prints_today_needs_a_day_and_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=rf"template_date: {date.today().isoformat()}"):
        prepared(tmp_path, TODAY)
    dataset = prepared(tmp_path / "with", TODAY, template_date="2026-01-31")
    tokenizer = Renderer.open(dataset / "tokenizer").tokenizer
    assert {tokenizer.decode(row["input_ids"]).split(".\n")[0] for row in table(dataset)} == {"It is 31 Jan 2026"}
    assert {tokenizer.decode(row["prompt_ids"]).split(".\n")[0] for row in table(dataset)} == {"It is 31 Jan 2026"}
    assert TemplateSettings.read(dataset / "tokenizer") == TemplateSettings(day=date(2026, 1, 31))


def test_documents_of_a_task_are_asked_with_the_same_arguments_and_day(tmp_path: Path) -> None:
    head = "{{- strftime_now('%Y-%m-%d') + ('' if enable_thinking else ' /no_think') + '\n' -}}"
    jinja = turns_as("{{- m.content -}}", head=head)
    dataset = prepared(tmp_path, jinja, template_date="2026-01-31", template_args={"enable_thinking": False})
    prompting = Prompting.of(dataset / "tokenizer")
    (row, *_) = [row for row in table(dataset) if row["prompt_ids"]]
    history = json.loads(row["messages"])[:-1]
    assert prompting.prompt(history) == prompting.tokenizer.decode(row["prompt_ids"])
    assert prompting.prompt(history).startswith("2026-01-31 /no_think\n<|im_start|>user\nwhat is")


def test_a_copy_of_the_base_reads_the_rows_as_it_does_and_others_have_no_arguments(tmp_path: Path) -> None:
    jinja = turns_as("{{- strftime_now('%Y') + m.content + ('' if enable_thinking else '!') -}}")
    settings = {"template_date": "1999-01-31", "template_args": {"enable_thinking": False}}
    dataset = prepared(tmp_path, jinja, **settings)
    rows = read_rows(dataset, "dev", "test")
    assert another(tmp_path / "base", dataset, rows) is None
    other = write_base(tmp_path / "other", chat_template=jinja.replace("'!'", "'?'"))
    assert "rendered otherwise" in (another(other, dataset, rows) or "")


def test_a_fixed_day_of_the_template_stands_unless_the_recipe_names_one(tmp_path: Path) -> None:
    head = "{%- if not date_string -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}{{- date_string -}}"
    CHATML._replace(template=turns_as("{{- m.content -}}", head=head)).renderer(tmp_path)
    for day, printed in ((None, "26 Jul 2024"), ("2026-01-31", "31 Jan 2026")):
        renderer = Renderer.open(tmp_path, settings=TemplateSettings.of({}, day))
        renderer.check_settings()
        (sample,) = samples_of(renderer, chat("a ?", "b"))
        assert renderer.tokenizer.decode(sample.rendered.input_ids).startswith(printed)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (TemplateSettings(args={"enabel_thinking": False}), "reads no argument enabel_thinking"),
        (TemplateSettings(day=date(2026, 1, 31)), "prints no date"),
    ],
)
def test_what_no_template_reads_is_refused(settings: TemplateSettings, says: str, tmp_path: Path) -> None:
    CHATML.renderer(tmp_path)
    with pytest.raises(StageError, match=says):
        Renderer.open(tmp_path, settings=settings).check_settings()


def test_nothing_is_written_for_a_template_without_settings(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, CHATML.template)
    assert not (dataset / "tokenizer" / "chat_template_args.json").exists()


def test_the_form_of_the_rows_is_noted_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=CHATML.template)
    rows = [{"messages": [{"role": "developer", "content": "be short"}, *row["messages"]]} for row in ROWS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    job = make_job("prepare", tmp_path / "out", params=PARAMS, data=data, tokenizer=base)
    prepare.run(job)
    assert notes(job)["form"] == "the chat template is given developer turns as system turns (60 rows)"


def test_a_text_that_begins_with_the_token_has_it_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", bos=True)
    rows = [{"text": f"<|begin|>the sky is {i}" if i % 2 else f"the sky is {i}"} for i in range(60)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepare.run(make_job("prepare", tmp_path / "out", params=PARAMS, data=data, tokenizer=base))
    renderer = Renderer.open(base)
    bos = renderer.tokenizer.bos_token_id
    seen = set[str]()
    for row in table(tmp_path / "out"):
        assert row["input_ids"][0] == bos
        assert bos not in row["input_ids"][1:]
        seen.add(renderer.tokenizer.decode(row["input_ids"], skip_special_tokens=True))
    assert seen == {f"the sky is {i}" for i in range(60)}


def test_a_template_that_writes_the_token_has_it_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", bos=True, chat_template="{{- bos_token -}}" + CHATML.template)
    renderer = Renderer.open(base)
    (sample,) = samples_of(renderer, chat("a ?", "b"))
    assert sample.rendered.input_ids.count(renderer.tokenizer.bos_token_id) == 1
    assert spans(renderer, sample.rendered) == ["b" + END]
