"""What is read from a chat template before any row is rendered: generation prompt, end of turn; and ChatML."""

from __future__ import annotations

import importlib.util
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from tasks.jobs.text.chat_template import GENERATION, ChatTemplate
from tasks.jobs.text.conversation import Conversation
from tasks.jobs.text.encoding import encode
from tasks.runtime.process.errors import StageError

PROBE = "Quench"


def templates_of(tokenizer: Any) -> list[str]:
    """The text of its template, or of each of those that have names."""
    return list(own.values()) if isinstance(own := tokenizer.chat_template, dict) else [own]


def training_template(tokenizer: Any) -> str | None:
    """TRL's training template where the tokenizer's own equals, byte for byte, one that TRL ships; else None."""
    own = tokenizer.chat_template
    if not isinstance(own, str) or GENERATION.search(own) or not _is_of_trl(own):
        return None
    from trl.chat_template_utils import get_training_chat_template  # takes as long as all other imports together

    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TypeError, TemplateError):  # ValueError: none shipped; the others: its probes are refused
        return None


def _is_of_trl(template: str) -> bool:
    """Whether TRL ships exactly this template: it keeps each in a file of its own."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).with_name("chat_templates") if spec and spec.origin else Path()
    files = list(folder.glob("*.jinja"))
    return not files or any(file.read_text(encoding="utf-8") == template for file in files)


def chatml(tokenizer: Any) -> str:
    """ChatML with generation markers, for this tokenizer.

    A turn ends with `<|im_end|>` where the vocabulary has it, else with the end-of-text token: the embedding table is
    not resized. Begins with the beginning-of-text token where the tokenizer puts it before plain text.
    """
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    bos = tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
    return (
        (f"{{{{- '{bos}' -}}}}\n" if bos else "")
        + "{%- for message in messages -%}\n"
        + "{{- '<|im_start|>' + message['role'] + '\\n' -}}\n"
        + "{%- if message['role'] == 'assistant' -%}\n"
        + f"{{%- generation -%}}{{{{- message['content'] + '{end}' -}}}}{{%- endgeneration -%}}\n"
        + f"{{%- else -%}}\n{{{{- message['content'] + '{end}' -}}}}\n{{%- endif -%}}\n"
        + "{{- '\\n' -}}\n{%- endfor -%}\n"
        + "{%- if add_generation_prompt -%}\n{{- '<|im_start|>assistant\\n' -}}\n{%- endif -%}\n"
    )


def generation_prompt(template: ChatTemplate) -> list[int]:
    """What the generation prompt adds to a history (Phi-3's end of all text does not stand before it)."""
    question = Conversation(turns=[{"role": "user", "content": PROBE}])
    texts = [template.text(question, prompted=prompted) for prompted in (False, True)]
    history, prompt = (tokens.ids for tokens in encode(template.tokenizer, texts))
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(history, prompt, strict=False)))
    return prompt[len(shared) :]


def end_of_turn(template: ChatTemplate, folder: Path, *, special: set[int]) -> int:
    """The first special token behind an assistant turn's text."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    text = template.text(Conversation(turns=turns))
    (tail,) = encode(template.tokenizer, [text[text.rindex(PROBE) + len(PROBE) :]])
    for token in tail.ids:
        if token in special:
            return token
    raise StageError.of(
        what="the chat template ends an assistant turn with no special token",
        where=str(folder),
        why="the model would never learn to stop",
        next="give a template whose turns end with the tokenizer's end token",
    )
