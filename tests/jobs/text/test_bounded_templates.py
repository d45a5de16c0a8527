"""Chat templates of strangers: they reach nothing, they end, and the error names the file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from recipes.models.chat_template import place_of
from tasks.jobs.text import chat_template
from tasks.jobs.text.chat_template import MIB, SECONDS
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.runtime.process.errors import StageError
from tests.jobs.test_prepare import chat
from tests.jobs.text.templates import CHATML

LOOP = "{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
TIME = {
    "a loop in a loop": "{% set r = range(99999) %}" + LOOP,
    "a power": "{{ 10 ** (10 ** 9) }}",  # while it is compiled: constants are folded
}
MEMORY = {
    "a long string": "{{ 'a' * 10 ** 10 }}",
    "doubled": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "padding": "{{ messages[0].content.center(10 ** 10) }}",
    "a format": "{{ '%9000000000d' | format(1) }}",
}
REFUSED = {
    "a long range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "a macro of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
    "deep parentheses": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion depth"),
    "deep loops": ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    "Python's classes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a function's globals": ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    "the row itself": ("{{ messages.append(1) }}", "unsafe"),
    "a format's attributes": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "a module": ("{% import 'os' as os %}", "no loader"),
}


def template(text: str) -> str:
    return text + CHATML.template


@pytest.mark.parametrize("text", [*TIME.values(), *MEMORY.values()], ids=[*TIME, *MEMORY])
def test_a_bomb_ends_and_its_file_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (SECONDS, MIB) == (10, 512)
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    began = time.process_time()
    with pytest.raises(StageError) as error:
        CHATML._replace(template=template(text)).renderer(tmp_path)
    problem = error.value.problem
    assert problem.where == str(tmp_path / "chat_template.jinja")
    ended = ["processor time"] if text in TIME.values() else ["MiB of memory", "processor time"]  # which is first
    assert any(reason in problem.why for reason in ended)
    assert time.process_time() - began < 20


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_sandbox_refuses_is_an_error_of_four_parts(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StageError) as error:
        CHATML._replace(template=template(text)).renderer(tmp_path)
    assert "cannot render" in error.value.problem.what and reason in error.value.problem.what
    assert error.value.problem.where == str(tmp_path)


def test_one_row_can_set_it_off_and_the_step_ends_not_only_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "{% if 'now' in messages[0].content %}{{ 'a' * 10 ** 10 }}{% endif %}"
    renderer = CHATML._replace(template=template(text)).renderer(tmp_path)
    assert renderer.render(Conversation.of(chat("later", "yes"), None)).input_ids
    with pytest.raises(StageError, match="512 MiB"):
        list(renderer.samples_of([Conversation.of(chat("now", "yes"), None)], max_length=64))


def test_a_text_far_longer_than_its_row_is_refused(tmp_path: Path) -> None:
    text = "{% if messages | length > 2 %}{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}{% endif %}"
    renderer = CHATML._replace(template=template(text)).renderer(tmp_path)
    with pytest.raises(StageError, match=r"makes [\d,]+ characters of a row that has"):
        renderer.render(Conversation.of(chat("fifty characters of text, or somewhat fewer", "b", "c", "d"), None))


def test_long_rows_are_rendered(tmp_path: Path) -> None:
    words = "a b c d " * 400
    row = Conversation.of(chat(*[words] * 400), None)
    assert len(json.dumps(row.turns)) > chat_template.FREE_CHARACTERS
    assert CHATML.renderer(tmp_path).template.text(row).count(words.strip()) == 400


def test_the_place_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "a", "template": "A"}]}))
    (tmp_path / "chat_template.jinja").write_text("B")
    assert place_of("A", tmp_path) == str(tmp_path / "tokenizer_config.json")
    assert place_of("B", tmp_path) == str(tmp_path / "chat_template.jinja")
    assert place_of("C", tmp_path) == "model.chat_template"


def test_a_refused_row_is_still_a_row(tmp_path: Path) -> None:
    text = "{% if messages[0].content == 'no' %}{{ messages[9].content }}{% endif %}"
    renderer = CHATML._replace(template=template(text)).renderer(tmp_path)
    with pytest.raises(RowError, match="is refused by the chat template"):
        renderer.render(Conversation.of(chat("no", "b"), None))
