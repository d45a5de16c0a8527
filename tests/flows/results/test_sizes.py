"""What a model in NF4 takes: experts of a mixture stay in bf16, towers too."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.results.sizes import nf4_weight_bytes
from recipes.models.headers import read_headers
from tests.recipes.folders import write_base
from tests.recipes.schemes.test_limits import EXPERTS, write_mixture


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_count_two_bytes_a_weight(tmp_path: Path, stacked: bool) -> None:
    dense = nf4_weight_bytes(read_headers(write_base(tmp_path / "dense")))
    router = 2 * 2 * 4 * 128
    assert nf4_weight_bytes(write_mixture(tmp_path / "mixture", stacked=stacked)) == dense + 2 * EXPERTS + router
