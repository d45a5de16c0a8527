"""Who quantizes: one module per backend, each with `quantize(request) -> Quantized`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.models.headers import read_headers
from tasks.runtime.process.events import Events

if TYPE_CHECKING:  # a body that needs no tensor does not pay for torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a backend is asked to quantize.

    Attributes:
        model: bf16 model folder.
        out: Gets model*.safetensors and config.json; other files are the caller's to replace.
        rows: Token ids of the calibration sequences, without padding; empty where the scheme needs none.
        params: The scheme's, with damp for GPTQ.
        device: `cpu` or `cuda`.
        events: Gets progress, and a note for everything that the backend does without saying so.
    """

    model: Path
    out: Path
    rows: Sequence[Sequence[int]]
    params: dict[str, Any]
    device: str
    events: Events

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return sum(map(len, self.rows))


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What a backend says about one linear layer.

    Attributes:
        name: Module name.
        loss: What rounding costs the layer's output, as the backend defines it; None where it says nothing.
        tokens: Calibration tokens that entered its statistics.
        damp: Damping that was used (GPTQ), or None.
        weight_error: ||W - Wq|| / ||W||, of backends that look at no data; a scaling before rounding (AWQ) has none.
    """

    name: str
    loss: float | None = None
    tokens: int | None = None
    damp: float | None = None
    weight_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a backend did. Holds no times: equal inputs give an equal quantize.json."""

    backend: str
    packer: str
    layers: list[LayerRecord]

    def as_dict(self) -> dict[str, Any]:
        """As quantize.json has it."""
        return asdict(self)


def relative_error(weight: Tensor, quantized: Tensor) -> float:
    """||W - Wq|| / ||W||, Frobenius norms in fp32; 0 where W is."""
    original = weight.float()
    return ((original - quantized.float()).norm() / original.norm().clamp(min=1e-30)).item()


def linear_names(model: Path) -> list[str]:
    """Names of the linear layers inside the decoder layers, in the order of the checkpoint."""
    return [layer.name for layer in read_headers(model).linears]


def unpadded(rows: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    """Calibration sequences as GPTQModel and AutoGPTQ take them, each without padding."""
    return [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in rows]


def equal_lengths(
    rows: Sequence[Sequence[int]],
    *,
    events: Events,
    why: str = "with unequal ones GPTQModel's AWQ looks at the last sequence only",
) -> list[list[int]]:
    """The same tokens in as many rows of equal length; a rest of fewer tokens than there are rows is left out.

    Where lengths differ, GPTQModel searches AWQ's scales and clipping on the last batch alone, and logs the tokens of
    all: of the quickstart's 30 sequences it would look at one.
    """
    if len({len(row) for row in rows}) == 1:
        return [list(row) for row in rows]
    stream = [token for row in rows for token in row]
    length = len(stream) // len(rows)
    events.note(
        "equal lengths",
        f"{len(rows)} sequences joined and cut anew into as many of {length} tokens, {len(stream) % len(rows)} tokens "
        f"left out: {why}",
    )
    return [stream[i * length : (i + 1) * length] for i in range(len(rows))]


def note_skipped(names: Iterable[str], quantized: Collection[str], *, events: Events) -> None:
    """Note which linear layers were not quantized."""
    if skipped := sorted(set(names) - set(quantized)):
        events.note("skipped layers", f"{len(skipped)} linear layers stay in bf16: {', '.join(skipped)}")


def note_tokens(layers: Sequence[LayerRecord], *, tokens: int, events: Events) -> None:
    """Note which layers saw other numbers of calibration tokens than there were."""
    if other := {layer.name: layer.tokens for layer in layers if layer.tokens not in (tokens, None)}:
        events.note("tokens", f"of {tokens} calibration tokens these layers saw other numbers: {other}")
