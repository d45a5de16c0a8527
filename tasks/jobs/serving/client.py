"""A client of an OpenAI-compatible server: forced losses, greedy answers, and how fast tokens come."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from tasks.jobs.measuring.decoding import Decoded
from tasks.jobs.measuring.teacher_forcing import TokenRow
from tasks.runtime.process.errors import StageError

AT_ONCE = 32  # prompts of one request; the engine batches them as it likes
TIMEOUT_S = 1800  # of a request; the first of a server may compile kernels
# Nothing but greedy decoding: the defaults of a request come from the model's generation_config.json otherwise.
GREEDY = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
IDS = {"add_special_tokens": False, "return_token_ids": True}


class Timed(NamedTuple):
    """One streamed request, in seconds since its batch of requests began.

    Attributes:
        sent: When it was sent.
        first: When its first token came.
        last: When its last token came.
    """

    sent: float
    first: float
    last: float


class Client:
    """What a server says of rows.

    Args:
        url: The server, without a path.
        name: Under which the model is served.
        trouble: Makes an error with the last lines of the engine's log.
    """

    def __init__(self, url: str, name: str, *, trouble: Callable[[str, str], StageError]) -> None:
        self._name, self._trouble = name, trouble
        limits = httpx.Limits(max_connections=64)
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False)

    def losses(self, rows: Sequence[TokenRow], on_batch: Callable[[], None]) -> Iterator[tuple[TokenRow, float]]:
        """-log p summed over the tokens of each row that count, in nats.

        Raises:
            StageError: The engine answers with an error, or a log-probability is missing or not finite.
        """
        for batch in _batches(rows):
            ids = [row.ids for row in batch]
            choices = self._complete(ids, max_tokens=1, prompt_logprobs=0)
            for row, tokens, choice in zip(batch, ids, choices, strict=True):
                yield row, self._loss(row, tokens, choice["prompt_logprobs"])
            on_batch()

    def _loss(self, row: TokenRow, ids: list[int], given: Sequence[dict[str, Any] | None]) -> float:
        if len(given) != len(ids):
            raise self._trouble(
                f"the engine read {len(given)} tokens of row {row.row}, which has {len(ids)}", "a loss of other tokens"
            )
        loss = 0.0
        for token, counts, entry in zip(ids, row.counted, given, strict=True):
            if counts:
                chosen = (entry or {}).get(str(token))
                if chosen is None or not math.isfinite(chosen["logprob"]):
                    raise self._trouble(
                        f"the engine gives no finite log-probability for a token of row {row.row}", "inf or NaN"
                    )
                loss -= chosen["logprob"]
        return loss

    def answers(
        self, rows: Sequence[TokenRow], ends: list[int], *, max_tokens: int, context: int, on_batch: Callable[[], None]
    ) -> Iterator[tuple[TokenRow, Decoded]]:
        """The greedy answer to each row's prompt.

        Args:
            rows: Rows with a prompt.
            ends: Token ids that end an answer.
            max_tokens: Longest answer.
            context: Tokens of prompt and answer that the engine takes; answers stop there.
            on_batch: Called after each batch.
        """
        for batch in _batches(rows):
            for room, together in _by_room(batch, max_tokens=max_tokens, context=context).items():
                prompts = [row.prompt_ids for row in together]
                choices = self._complete(prompts, max_tokens=room, stop_token_ids=ends, skip_special_tokens=False)
                for row, choice in zip(together, choices, strict=True):
                    decoded = Decoded.of(choice["token_ids"], ends)
                    # an engine may leave out the token that it stopped at
                    yield row, decoded._replace(ended=decoded.ended or choice.get("finish_reason") == "stop")
            on_batch()

    def stream(self, prompts: Sequence[list[int]], *, new_tokens: int) -> list[Timed]:
        """Send all prompts at once, each in a request of its own; every answer has exactly `new_tokens` tokens."""
        start = time.perf_counter()
        body = {"max_tokens": new_tokens, "ignore_eos": True, "stream": True, "return_token_ids": True, **GREEDY}

        def one(prompt: list[int]) -> Timed:
            sent = time.perf_counter() - start
            arrived: list[float] = []
            request = {"model": self._name, "prompt": prompt, "add_special_tokens": False, **body}
            with self._http.stream("POST", "/v1/completions", json=request) as answer:
                for line in answer.iter_lines():
                    if answer.status_code != httpx.codes.OK:
                        raise self._trouble(f"the engine answers {answer.status_code}", line)
                    if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                        arrived.append(time.perf_counter() - start)
            if not arrived:
                raise self._trouble("the engine sent no token", "a stream that ended at once")
            return Timed(sent, arrived[0], arrived[-1])

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts))

    def _complete(self, prompts: Sequence[list[int]], **settings: Any) -> list[dict[str, Any]]:
        """The choices of one request with several prompts, in their order."""
        body = {"model": self._name, "prompt": list(prompts), **GREEDY, **IDS, **settings}
        try:
            answer = self._http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise self._trouble("the engine did not answer a request", f"{type(error).__name__} {error}") from error
        if answer.status_code != httpx.codes.OK:
            raise self._trouble(f"the engine answers {answer.status_code} to a request", answer.text[:300])
        return sorted(answer.json()["choices"], key=lambda choice: choice["index"])


def _batches(rows: Sequence[TokenRow]) -> Iterator[Sequence[TokenRow]]:
    """The longest first, as evaluate has them."""
    ordered = sorted(rows, key=lambda row: (-len(row.ids), row.row))
    for start in range(0, len(ordered), AT_ONCE):
        yield ordered[start : start + AT_ONCE]


def _by_room(rows: Sequence[TokenRow], *, max_tokens: int, context: int) -> dict[int, list[TokenRow]]:
    """Rows by the tokens that their answers may have: a long prompt cuts off no answer but its own."""
    rooms: dict[int, list[TokenRow]] = {}
    for row in rows:
        rooms.setdefault(min(max_tokens, context - len(row.prompt_ids)), []).append(row)
    return rooms
