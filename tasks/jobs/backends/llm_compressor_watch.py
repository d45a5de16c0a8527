"""What one call of llm-compressor reports about the linear layers; its modifiers fill this in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from recipes.schemes.scheme import Scheme
from tasks.jobs.backends import LayerRecord, note_tokens
from tasks.runtime.process.events import Events


class Watch:
    """Figures by layer name, and warnings as notes.

    Attributes:
        losses: GPTQ: sum of squared errors over the inverse Hessian's diagonal; AWQ: mean squared error of the block's
            output at the scales that were chosen.
        tokens: Calibration tokens that entered the statistics.
        dead: Inputs whose Hessian diagonal was 0.
        rounded: Layers whose Hessian did not factor.
    """

    def __init__(self, events: Events, *, layers: int, device: str) -> None:
        self.losses: dict[str, float] = {}
        self.tokens: Counter[str] = Counter()
        self.dead: dict[str, int] = {}
        self.rounded: list[str] = []
        self._events, self._layers, self._done = events, layers, 0
        self._noted = {"No accelerator available! Compressing model on CPU instead"} if device == "cpu" else set[str]()

    def layer_done(self) -> None:
        """A decoder layer is done; the last part, behind them, holds nothing to quantize."""
        self._done += 1
        self._events.progress(min(self._done, self._layers), self._layers, unit="layer")

    def note_warning(self, message: Any) -> None:
        """Note a line of its log, each text once; its level METRIC stands above WARNING."""
        text = message.record["message"]
        if message.record["level"].name != "METRIC" and text not in self._noted:
            self._noted.add(text)
            self._events.note("llm-compressor", text)

    def record(self, name: str, scheme: Scheme, *, damp: float | None) -> LayerRecord:
        """The record of one layer; a layer that was rounded to nearest has neither loss nor damping."""
        rounded = name in self.rounded
        return LayerRecord(
            name=name,
            loss=None if rounded else self.losses.get(name),
            tokens=self.tokens.get(name),
            damp=damp if scheme.method == "gptq" and not rounded else None,
        )

    def note_habits(self, ignored: Sequence[str], layers: Sequence[LayerRecord], *, tokens: int) -> None:
        """Note which layers were left out, rounded or set to zero."""
        events = self._events
        if left := [name for name in ignored if name != "lm_head"]:
            events.note("skipped modules", f"{len(left)} linear layers stay in bf16: {', '.join(left)}")
        if self.rounded:
            events.note(
                "rounded to nearest", f"the Hessian of {len(self.rounded)} layers did not factor: {self.rounded}"
            )
        if self.dead:
            events.note("dead inputs", f"inputs that were always 0, whose weights are written as 0: {self.dead}")
        note_tokens(layers, tokens=tokens, events=events)
        if silent := [layer.name for layer in layers if layer.loss is None and layer.name not in self.rounded]:
            events.note("layers without a loss", f"{len(silent)} that AWQ rounds unscaled: {', '.join(silent)}")
