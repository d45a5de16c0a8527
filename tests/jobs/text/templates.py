"""Chat templates of the five common types, in their structure: headers, ends of turns, refusals, tools, thinking."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tasks.jobs.text.rendering import Renderer
from tests.tiny import BOS, END, write_tokenizer

CALLS = "{%- for call in m.tool_calls or [] -%}{{- BEFORE + (call.function | tojson) + AFTER -}}{%- endfor -%}"


class Family(NamedTuple):
    """A template and the special tokens that it needs.

    Attributes:
        bos: Its beginning-of-text token, None where it has none.
        end: The token that ends a turn.
        lead: What the template puts between the generation prompt and an assistant's text.
    """

    template: str
    bos: str | None
    end: str
    special: tuple[str, ...]
    lead: str = ""

    def renderer(self, folder: Path, *, pad: str | None = None) -> Renderer:
        """A tokenizer with this template, written to `folder`; by default the padding token is the end token."""
        return Renderer.open(
            write_tokenizer(
                folder, self.template, special=self.special, bos=self.bos, end=self.end, pad=pad or self.end
            )
        )


def _calls(before: str, after: str = "") -> str:
    return CALLS.replace("BEFORE", f"'{before}'").replace("AFTER", f"'{after}'")


LLAMA3 = Family(
    "{{- bos_token -}}"
    "{%- if tools -%}{{- '<|start_header_id|>system<|end_header_id|>\n\nTools: ' + (tools | tojson) + '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- set role = 'ipython' if m.role == 'tool' else m.role -%}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + (m.content or '') | trim -}}"
    + _calls("")
    + "{{- '<|eom_id|>' if m.tool_calls else '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}",
    bos="<|begin_of_text|>",
    end="<|eot_id|>",
    special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
)
# No system role, strict alternation, no generation prompt; tools stand before the last question alone.
MISTRAL = Family(
    "{{- bos_token -}}{%- set seen = namespace(turns=0, last=0) -%}"
    "{%- for m in messages if m.role == 'user' -%}{%- set seen.last = loop.index -%}{%- endfor -%}"
    "{%- set asked = namespace(count=0) -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) -%}"
    "{%- if (m.role == 'user') != (seen.turns % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user/assistant/user/assistant') -}}{%- endif -%}"
    "{%- set seen.turns = seen.turns + 1 -%}{%- endif -%}"
    "{%- if m.role == 'user' -%}{%- set asked.count = asked.count + 1 -%}"
    "{%- if tools and asked.count == seen.last -%}"
    "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{{- '[INST] ' + m.content + '[/INST]' -}}"
    "{%- elif m.role == 'assistant' and m.tool_calls -%}{{- '[TOOL_CALLS]' -}}" + _calls(" ") + "{{- '</s>' -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content | trim + '</s>' -}}"
    "{%- elif m.role == 'tool' -%}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' -}}"
    "{%- else -%}{{- raise_exception('only user, assistant and tool roles') -}}{%- endif -%}"
    "{%- endfor -%}",
    bos="<s>",
    end="</s>",
    special=(
        *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    lead=" ",
)
_TOOLS = "{%- if tools -%}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' -}}{%- endif -%}"
_RESULT = "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' -}}"
PROMPT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
CHATML = Family(
    _TOOLS + "{%- for m in messages -%}{%- if m.role == 'tool' -%}" + _RESULT + "{%- else -%}"
    "{{- '<|im_start|>' + m.role + '\n' + (m.content or '') -}}"
    + _calls("<tool_call>", "</tool_call>")
    + "{{- '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    + PROMPT,
    bos=None,
    end=END,
    special=(),
)
_GEMMA = (
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + HEAD m.content | trim"
    " + '<end_of_turn>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
_GEMMA_TOKENS = ("<bos>", "<start_of_turn>", "<end_of_turn>")
GEMMA = Family(  # refuses a system turn
    "{{- bos_token -}}{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}"
    "{%- endif -%}{%- for m in messages -%}" + _GEMMA.replace("HEAD", ""),
    bos="<bos>",
    end="<end_of_turn>",
    special=_GEMMA_TOKENS,
)
GEMMA3 = Family(  # merges it into the first user turn
    "{{- bos_token -}}{%- set head = '' -%}{%- set turns = messages -%}"
    "{%- if messages[0].role == 'system' -%}{%- set head = messages[0].content + '\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- endif -%}"
    "{%- for m in turns -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}"
    "{%- endif -%}" + _GEMMA.replace("HEAD", "(head if loop.first else '') +"),
    bos="<bos>",
    end="<end_of_turn>",
    special=_GEMMA_TOKENS,
)
# Thinking stands in the turns behind the last question alone, an empty one in the last turn.
QWEN3 = Family(
    _TOOLS + "{%- set asked = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set asked.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for m in messages -%}{%- if m.role == 'tool' -%}" + _RESULT + "{%- elif m.role == 'assistant' -%}"
    "{%- set text = m.content or '' -%}{%- set thought = '' -%}"
    "{%- if '</think>' in text -%}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if loop.index0 > asked.last and (loop.last or thought) -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- text -}}" + _calls("<tool_call>", "</tool_call>") + "{{- '<|im_end|>\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    + PROMPT,
    bos=None,
    end=END,
    special=(),
    lead="<think>\n\n</think>\n\n",
)
# One bos before plain text and its end is another token than the one behind all (Phi-3).
PHI3 = Family(
    "{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}"
    "{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}",
    bos=BOS,
    end="<|endoftext|>",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
