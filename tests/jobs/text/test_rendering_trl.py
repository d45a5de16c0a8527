"""Rendering by the templates that TRL ships, read from its installed files: those of some 35 real models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import trl

from tasks.jobs.text.conversation import RowError
from tasks.runtime.process.errors import StageError
from tests.jobs.test_prepare import chat
from tests.jobs.text.templates import CHATML, GEMMA, LLAMA3, PHI3, QWEN3, Family
from tests.jobs.text.test_rendering import samples_of, spans, thinking
from tests.tiny import BOS, END, PAD, START

TRL = Path(trl.__file__).parent / "chat_templates"
SHIPPED = {
    "llama3": LLAMA3,
    "qwen2_5": CHATML,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "phi3": PHI3,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_trls_training_template_gives_the_mask_that_prefixes_give(name: str, tmp_path: Path) -> None:
    own = (TRL / f"{name}.jinja").read_text(encoding="utf-8")
    renderer = SHIPPED[name]._replace(template=own).renderer(tmp_path)
    without = replace(renderer, template=replace(renderer.template, training=None))
    assert renderer.template.training == (TRL / f"{name}_training.jinja").read_text(encoding="utf-8")
    turns = chat("what ?", "blue") if name == "qwen3" else chat("what ?", "blue", "sure ?", "yes")
    (one,), (other,) = samples_of(renderer, turns), samples_of(without, turns)
    assert (one.rendered.way, other.rendered.way) == ("TRL's training template", "prefixes")
    assert replace(one.rendered, way="prefixes") == other.rendered
    patched = renderer.tokenizer.apply_chat_template(turns, chat_template=renderer.template.training, return_dict=False)
    assert patched == one.rendered.input_ids
    changed = SHIPPED[name]._replace(template=own + "{#- one byte more -#}").renderer(tmp_path / "other")
    assert changed.template.training is None


CONTROL = re.compile(r"<[^<>\s'\"{}%]{1,40}>|<｜[^｜]+｜>")
WORDS_OF = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tools>", "</tools>"}  # no special tokens there
NO_TEXT = {"idefics3", "llava_next", "smolvlm"}  # of image models: turns are lists of parts
NO_END = {"glm4moe"}  # a turn ends where the next begins


@pytest.mark.parametrize("asked", ["chat", "thinking"])
def test_every_template_that_trl_ships_is_masked_or_refused(asked: str, tmp_path: Path) -> None:
    masked, refused = set[str](), set[str]()
    turns = chat("what ?", "blue", "sure ?", "yes") if asked == "chat" else thinking("what ?", "blue", "sure ?", "yes")
    for path in TRL.glob("*.jinja"):
        name, own = path.stem, path.read_text(encoding="utf-8")
        if name.endswith("_training"):
            continue
        tokens = sorted({*CONTROL.findall(own), "</s>", "<bos>"} - WORDS_OF - {PAD, START, END, BOS})
        ends = [token for token in ("<｜end▁of▁sentence｜>", END) if token in own] or ["</s>"]
        try:
            family = Family(own, "<bos>", ends[0], tuple(tokens))
            renderer = family.renderer(tmp_path / name, pad="</s>")
            samples = samples_of(renderer, turns)
        except (StageError, RowError):
            refused.add(name)
            continue
        first, second = [text for sample in samples for text in spans(renderer, sample.rendered)]
        assert re.search(r"blue<[^<>]+>$", first), (name, first)
        assert re.search(r"yes<[^<>]+>$", second), (name, second)
        masked.add(name)
    # R1 and V3 leave thinking out of every turn, and Qwen3.5's turns without thinking begin with an empty one.
    other = {"deepseek_r1_distill", "deepseekv3", "qwen3_5_nothink"} if asked == "thinking" else set[str]()
    assert refused == NO_TEXT | NO_END | other
    assert len(masked) >= 33


def test_qwen3s_own_template_makes_samples_where_trls_renders_other_ids(tmp_path: Path) -> None:
    renderer = QWEN3._replace(template=(TRL / "qwen3.jinja").read_text(encoding="utf-8")).renderer(tmp_path)
    turns = thinking("what ?", "blue", "sure ?", "yes")
    samples = samples_of(renderer, turns)
    assert [sample.rendered.way for sample in samples] == ["one sample a turn"] * 2
    assert [spans(renderer, sample.rendered) for sample in samples] == [
        [turns[1]["content"] + END],
        [turns[3]["content"] + END],
    ]
    assert "thought 1" not in renderer.tokenizer.decode(
        samples[1].rendered.input_ids
    )  # the history that a server renders
    patched = renderer.tokenizer.apply_chat_template(turns, chat_template=renderer.template.training, return_dict=False)
    assert patched != samples[1].rendered.input_ids
