"""Messages to people through a Prefect notification block, named TYPE/NAME as Prefect's pages show it."""

from __future__ import annotations

import prefect.blocks.notifications  # noqa: F401  registers Prefect's own types
from prefect import task
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block, UnknownBlockType
from prefect.cache_policies import NO_CACHE

from recipes.problem import Problem

RETRY_S = [2.0, 10.0]


def notification_block(name: str) -> NotificationBlock:
    """Load a block.

    Raises:
        RecipeError: There is no such block, it cannot be loaded here, or it sends no messages.
    """
    if "/" not in name:
        raise _refusal(name, "A block is named by its type and its name.").error()
    try:
        block: object = Block.load(name)
    except (ValueError, RuntimeError, UnknownBlockType) as error:  # no such block; its data or its package are not here
        raise _refusal(name, str(error)).error() from None
    if not isinstance(block, NotificationBlock):
        raise _refusal(name, f"{type(block).__name__} is no block that sends messages.").error()
    return block


def _refusal(name: str, why: str) -> Problem:
    return Problem(
        what=f"There is no notification block {name!r} to load.",
        where="notify",
        why=why,
        next="Make one in Prefect's pages (Blocks) and name it as they do: slack-webhook/NAME, custom-webhook/NAME.",
    )


def send(name: str, subject: str, body: str) -> None:
    """Send a message; raises whatever the block does where it cannot be delivered."""
    block = notification_block(name)
    with block.raise_on_failure():
        block.notify(body, subject)  # pyright: ignore[reportUnusedCoroutine]


@task(
    name="notify",
    retries=len(RETRY_S),
    retry_delay_seconds=RETRY_S,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def deliver(name: str, subject: str, body: str) -> None:
    """`send`; a message that cannot be delivered is a failed task in the run's page and log, and fails nothing else."""
    send(name, subject, body)
