"""`quench promote`: a run's candidate through the gate, or back to an earlier champion."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from flows.commands.terminal import DONE, FAILED, Output, say
from flows.promotion.promote import model_name, promote, roll_back, sentences
from flows.run.folder import find_run
from tasks.runtime.store.home import open_home
from tasks.runtime.store.local import find_home


def command(args: argparse.Namespace) -> Output:
    """Decide or roll back; exit code 0 where the champion is what was asked for, else 1.

    Raises:
        RecipeError: No such run or version; files that are damaged; a champion that cannot be compared with.
        StepFailed: The champion does not load here: it stays champion.
    """
    home = find_home()
    open_home(home)
    run = find_run(home, args.run)
    back = args.to is not None
    decision = roll_back(home, model_name(run), args.to, say=say) if back else promote(run, home, say=say)
    for line in decision.trouble:
        say(f"MLflow is behind promotions.jsonl: {line}")
    return Output(
        json={**decision._asdict(), "promotion": decision.promotion and asdict(decision.promotion)},
        text="\n".join(sentences(decision)),
        code=DONE if decision.event in ("promoted", "nothing", "rolled back") else FAILED,
    )
