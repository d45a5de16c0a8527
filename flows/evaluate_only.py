"""The evaluate-only flow: scores again what is in the store, and makes nothing that takes training or quantizing."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from flows.credentials import settle
from flows.pipeline import WAITING_TASKS, refusals_logged, run_vetted
from flows.plan import Planned
from flows.vet import vet
from recipes.problem import Problem, RecipeError
from tasks.runtime.store import find_home

SCORING = ("rehearse", "reference", "choose", "evaluate", "measure")


@flow(  # pyright: ignore[reportCallIssue]
    name="evaluate-only",
    flow_run_name="{recipe}",
    task_runner=ThreadPoolTaskRunner(max_workers=WAITING_TASKS),  # pyright: ignore[reportArgumentType]
    persist_result=False,
)
def evaluate_only(recipe: str, sets: list[str] | None = None, only: list[str] | None = None) -> str:
    """Evaluate again what an earlier run made: new scorers, longer answers, speed; no training, no quantizing.

    Args:
        recipe: Path of the recipe file, absolute or seen from the folder where the command is typed.
        sets: Overrides of single fields, as ["evaluate.max_new_tokens=64"].
        only: Arms that are wanted, `external` for every external model.

    Returns:
        The run's folder.

    Raises:
        RecipeError: Bad input, or something that only finetune-and-quantize makes is not in the store.
        RunFailed: A step failed; the report says which and why.
    """
    settle(get_run_logger())
    with refusals_logged():
        vetted = vet(Path(recipe), sets=sets or [], home=find_home(), only=only or [])
        if problems := [_missing(one) for one in vetted.plan if not one.hit and one.key.split("/")[0] not in SCORING]:
            raise RecipeError(problems)
    return run_vetted(vetted, only=only or [])


def _missing(step: Planned) -> Problem:
    return Problem(
        what=f"{step.key} is not in the store.",
        where="evaluate-only",
        why=f"It would have to be made ({step.why}), and this flow makes only scores.",
        next="Run finetune-and-quantize with this recipe first.",
    )
