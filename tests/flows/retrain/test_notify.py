"""A name that is no notification block is refused before anything is spent."""

from __future__ import annotations

import pytest
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.retrain.notify import notification_block
from recipes.problem import RecipeError


def test_what_sends_no_messages_is_refused(prefect_api: str) -> None:
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        Secret(value="x").save("no-messages", overwrite=True)
        for name, why in (
            ("ops", "named by its type and its name"),
            ("slack-webhook/nobody", "nobody"),
            ("no-such-type/ops", "no-such-type"),
            ("secret/no-messages", "Secret is no block that sends messages"),
        ):
            with pytest.raises(RecipeError, match="There is no notification block") as caught:
                notification_block(name)
            assert why in caught.value.problems[0].why
