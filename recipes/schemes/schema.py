"""An entry of `quantize.schemes` that is more than a slug. The string under a field is its documentation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from recipes.schemes.scheme import Backend
from recipes.section import Section


class LayerRule(Section):
    match: str
    """Regular expression, searched in a layer's full name (`self_attn`, `layers\\.0\\.`). The first rule that matches
    counts. q, k and v, and gate and up, have to fall under one rule: servers load them as one weight."""
    keep: bool = False
    """Leave these layers in bf16; the rule then has no grid."""
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits per weight; default: the scheme's."""
    group_size: Annotated[int, Field(ge=-1)] | None = None
    """Inputs per scale, -1 for per channel; default: the scheme's."""


class SchemeSpec(Section):
    scheme: str
    """Slug; `quench schemes` lists them."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,59}$")] | None = None
    """Name of the arm; default: the slug, with the backend behind it where one is named. Needed beside `rules` and
    `kv_scales`."""
    backend: Backend | None = None
    """Another backend than the scheme's own: `autoawq` for AWQ, `auto-gptq` for GPTQ (archived packages, which `make
    env-autoawq` and `make env-autogptq` install)."""
    rules: list[LayerRule] = []
    """Other grids for some layers. compressed-tensors schemes (ct-) only: other mixed files load in no server."""
    kv_scales: bool = False
    """Calibrate FP8 scales of the KV cache and write them into the files (ct- schemes only)."""

    @model_validator(mode="after")
    def _named(self) -> SchemeSpec:
        if (self.rules or self.kv_scales) and self.name is None:
            raise ValueError(
                f"name is missing: {self.scheme} with rules or kv_scales is another scheme than the plain one"
            )
        return self
