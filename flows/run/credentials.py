"""Passwords and tokens of a flow's process: from the environment, or from Prefect's Secret blocks in a deployment.

They stay in this process's environment: children get none (tasks/runtime/process/launch.py), and nothing that is
written holds one.
"""

from __future__ import annotations

import logging
import os
from urllib.parse import unquote, urlsplit, urlunsplit

from recipes.secrets import hide
from tasks.runtime.process.user import settle_user
from tasks.runtime.store.home import home_folder

# What the parent of all steps may need; each is also looked for in a Secret block, HF_TOKEN in `quench-hf-token`.
VARIABLES = (
    "HF_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)
URI, USER, PASSWORD = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"


def take_out_password() -> None:
    """Take user and password out of MLFLOW_TRACKING_URI into the two variables that MLflow has for them.

    The address stands in links, in messages of MLflow and in up.json. A database's URL keeps its password.
    """
    parts = urlsplit(os.environ.get(URI, ""))
    if parts.scheme not in ("http", "https") or parts.password is None:
        return
    os.environ[URI] = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    os.environ[USER], os.environ[PASSWORD] = unquote(parts.username or ""), unquote(parts.password)


def block_name(variable: str) -> str:
    """Name of the Secret block that stands for an environment variable."""
    return f"quench-{variable.lower().replace('_', '-')}"


def settle(log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
    """Start a flow: hide secrets in its log, know its user, and in a deployment take what its Secret blocks hold.

    A variable that the environment has wins over a block of its name.

    Raises:
        RecipeError: QUENCH_HOME begins with `~`, and nobody knows a home.
    """
    hide_in_logs()
    take_out_password()
    for line in settle_user(home_folder()):  # a worker that is not ours may have started this
        log.warning("%s", line)
    from prefect.runtime import deployment

    if deployment.id is None:
        return
    for variable, value in _blocks([name for name in VARIABLES if name not in os.environ]).items():
        os.environ[variable] = value
        log.info("%s is taken from the Secret block %s", variable, block_name(variable))


def _blocks(variables: list[str]) -> dict[str, str]:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    values: dict[str, str] = {}
    with get_client(sync_client=True) as client:
        for variable in variables:
            try:
                block = client.read_block_document_by_name(block_name(variable), "secret")
            except ObjectNotFound:
                continue
            values[variable] = str(block.data["value"])
    return values


class Hiding(logging.Filter):
    """Takes secrets out of records, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always wanted."""
        record.msg, record.args = hide(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = hide(logging.Formatter().formatException(record.exc_info))
        return True


def hide_in_logs() -> None:
    """Let what handles Prefect's records, and the terminal's, show no secret. Safe to call twice."""
    for name in ("", "prefect.flow_runs", "prefect.task_runs", "prefect.workers", "prefect.extra"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(present, Hiding) for present in handler.filters):
                handler.addFilter(Hiding())
