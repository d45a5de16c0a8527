"""Greedy answers: plain decoding that ends with the turn, and how rows share batches.

A batch decodes until its longest answer has ended, and a step of one row costs nearly as much as a step of many. So
where at most an eighth of a batch still runs, these rows are put aside, and go on in batches of such rows: each from
its prompt and what it has said, whose cache one forward pass makes anew. That takes nothing of a model but its forward
pass, so it holds for every kind of cache. docs/results/evaluation.md has what it saves.

An answer is the one that its first batch alone would have given, but for noise of arithmetic: sums in bf16 depend on
the shape of a product. How much that is, the null arm `null-batch` shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tasks.jobs.measuring.teacher_forcing import Caches, TokenRow, batches, padded
from tasks.jobs.measuring.tiles import Model

LEFT = 1 / 8  # of a batch
# Rotary embeddings whose angles depend on the longest row of a batch: a cache made anew would hold other keys.
BY_LENGTH = ("dynamic", "longrope")


def greedy_config(folder: Path, *, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding that ends with the turn.

    Only end and pad ids come from the dataset's generation_config.json: a base's own need not end at the end of a turn,
    and its sampling settings and penalties are not what arms are compared by.
    """
    stored = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    ends = stored.eos_token_id if isinstance(stored.eos_token_id, list) else [stored.eos_token_id]
    pad = ends[0] if stored.pad_token_id is None else stored.pad_token_id
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad)


class Decoded(NamedTuple):
    """An answer in tokens.

    Attributes:
        tokens: Without the token that ends it.
        ended: Such a token came; without one the answer was cut off where no more tokens were decoded.
    """

    tokens: list[int]
    ended: bool

    @classmethod
    def of(cls, tokens: list[int], ends: Sequence[int]) -> Decoded:
        """Of what was decoded: behind the end there may be padding, which a batch needs until its last answer ends."""
        kept = before_end(tokens, ends)
        return cls(kept, len(kept) < len(tokens))


def before_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens of an answer up to the first that ends it."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """How answers are decoded.

    Attributes:
        model: The model.
        config: Which tokens end an answer, and how many it may have.
        size: Rows a batch.
        caches: Makes an empty cache; None for the model's own.
        left: Share of a batch that is put aside; 0 where every batch decodes to its end.
    """

    model: Model
    config: GenerationConfig
    size: int
    caches: Caches | None = None
    left: float = LEFT

    def answers(
        self,
        rows: Sequence[TokenRow],
        *,
        begun: Callable[[], None] = lambda: None,
        note: Callable[[str, str], None] = lambda about, text: None,
    ) -> Iterator[tuple[TokenRow, Decoded]]:
        """The greedy answer of each row, in the order in which they end.

        Args:
            rows: With prompts. Those with reference answers of like length begin in one batch.
            begun: Called after each batch of rows that begin.
            note: Takes the reason, where every batch has to be decoded to its end.
        """
        whole = why_whole(self.model, rows, self.config) if self.left else None
        if whole:
            note("batches", f"each is decoded until its longest answer has ended: {whole}")
        left = 0 if whole else self.left
        said: dict[str, list[int]] = {}
        ahead, fresh = batches(rows, self.size, key=lambda row: row.answer_tokens), True
        while ahead:
            aside: list[TokenRow] = []
            for batch in ahead:
                most = int(len(batch) * left) if len(ahead) > 1 else 0
                for row, decoded in zip(batch, self._decoded(batch, said, most), strict=True):
                    if decoded.ended or len(decoded.tokens) == self.config.max_new_tokens:
                        yield row, decoded
                    else:
                        aside.append(row)
                        said[row.row] = decoded.tokens
                if fresh:
                    begun()
            ahead, fresh = batches(aside, self.size, key=lambda row: len(said[row.row])), False

    def _decoded(self, batch: Sequence[TokenRow], said: dict[str, list[int]], most: int) -> list[Decoded]:
        """All that these rows have said when at most `most` of them still run."""
        before = [said.get(row.row, []) for row in batch]
        prompts = [[*row.prompt_ids, *own] for row, own in zip(batch, before, strict=True)]
        limit, ends = self.config.max_new_tokens, self.config.eos_token_id
        config = copy.copy(self.config)
        config.max_new_tokens = limit - min(map(len, before))
        made = _generated(self.model, prompts, config, self.caches, most=most)
        return [Decoded.of([*own, *new][:limit], ends) for own, new in zip(before, made, strict=True)]


def greedy_answers(
    model: Model, rows: Sequence[TokenRow], config: GenerationConfig, caches: Caches | None = None
) -> list[Decoded]:
    """The greedy answers of one batch, decoded to the end of the longest."""
    made = _generated(model, [row.prompt_ids for row in rows], config, caches)
    return [Decoded.of(tokens, config.eos_token_id) for tokens in made]


def why_whole(model: Model, rows: Sequence[TokenRow], config: GenerationConfig) -> str | None:
    """Why these rows' batches have to be decoded to their end; None where what is left of one may go on elsewhere."""
    text: Any = model.config.get_text_config(decoder=True)
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    if kind := next((kind for kind in BY_LENGTH if kind in kinds), None):
        return f"its rotary embedding ({kind}) depends on the longest row of a batch"
    # A row that is done may wait in its batch for one that has all of its answer before it.
    needed = max((len(row.prompt_ids) for row in rows), default=0) + 2 * config.max_new_tokens
    places = getattr(text, "max_position_embeddings", None)
    if places is not None and needed > places:
        return f"prompts and twice the longest answer are {needed} tokens, and its context has {places}"
    return None


def _generated(
    model: Model, prompts: Sequence[Sequence[int]], config: GenerationConfig, caches: Caches | None, *, most: int = 0
) -> list[list[int]]:
    """New tokens of each prompt when at most `most` of them still run; prompts are padded on the left."""
    ids, mask = padded(prompts, left=True)
    ids, mask = ids.to(model.device), mask.to(model.device)
    generator: Any = model
    generator.generation_config = config  # generate() takes unset fields from the checkpoint's own
    more: dict[str, Any] = {"past_key_values": caches()} if caches else {}
    if most:
        more["stopping_criteria"] = StoppingCriteriaList([_FewRun(len(prompts), config.eos_token_id, most)])
    with torch.inference_mode():
        made = generator.generate(input_ids=ids, attention_mask=mask, generation_config=config, **more)
    return made[:, ids.shape[1] :].tolist()


class _FewRun(StoppingCriteria):
    """Ends a batch of so many rows when at most `most` have not said a token that ends an answer."""

    def __init__(self, rows: int, ends: Sequence[int], most: int) -> None:
        self._ends, self._most, self._running = torch.tensor(ends), most, torch.ones(rows, dtype=torch.bool)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """[rows], all of them done or none; called behind each token."""
        device = input_ids.device
        self._running = self._running.to(device) & ~torch.isin(input_ids[:, -1], self._ends.to(device))
        return (self._running.sum() <= self._most).expand(len(input_ids))
