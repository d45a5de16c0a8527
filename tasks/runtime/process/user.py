"""Whose process this is: a name for its user and folders that it can write, also where the machine has neither.

Containers run with a user id that the password file does not have (`docker run -u 12345`, OpenShift) and with a HOME
that is unset, `/` or on a read-only disk. There getpass.getuser and Path.home raise, also while Prefect, MLflow or
torch are imported, and caches cannot be written.
"""

from __future__ import annotations

import contextlib
import getpass
import os
from pathlib import Path

FOLDER = "user"  # below QUENCH_HOME: the HOME of processes that have none
HUGGING_FACE = ".cache/huggingface"
# What libraries look for below HOME and only read: variable -> its place. Where HOME moves, these stay.
READ = {
    "AWS_SHARED_CREDENTIALS_FILE": ".aws/credentials",
    "AWS_CONFIG_FILE": ".aws/config",
    "PGPASSFILE": ".pgpass",
    "NETRC": ".netrc",
}
READ_ONLY_HUB = {"HF_HUB_CACHE": f"{HUGGING_FACE}/hub", "HF_TOKEN_PATH": f"{HUGGING_FACE}/token"}
TEMPORARY = ("/tmp", "/var/tmp", "/usr/tmp")  # where Python's tempfile looks, besides TMPDIR and the current folder


def user_name() -> str:
    """Name of this process's user; the id where the password file has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return str(os.getuid())


def settle_user(home: Path) -> list[str]:
    """Give this process, its libraries and all children a user name, a HOME and a folder for temporary files.

    Only what is missing is set, in os.environ; to be called before prefect or mlflow are imported.

    Args:
        home: QUENCH_HOME; need not be there yet.

    Returns:
        What had to be set, in words. Empty in a process that inherited it.
    """
    if (name := user_name()).isdecimal():
        os.environ["LOGNAME"] = name  # the first that getpass.getuser looks at
    own = home / FOLDER
    said: list[str] = []
    old = Path(os.path.expanduser("~"))  # noqa: PTH111 - `~` itself where nobody knows a home; pathlib's raises
    if why := _unusable(old):
        _keep_reading(old)
        os.environ["HOME"] = str(own)
        if old != own:
            said.append(f"{why}: caches go below {own}")
    temporary = [*filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), *TEMPORARY]
    if not any(_writable(Path(folder)) for folder in temporary):
        os.environ["TMPDIR"] = str(own / "tmp")
        said.append(f"no folder for temporary files can be written ({', '.join(temporary)}): they go to {own}/tmp")
    if home.is_dir():  # a command that only looks makes none
        for folder in (os.environ["HOME"], os.environ.get("TMPDIR", "")):
            if folder.startswith(str(own)):
                with contextlib.suppress(OSError):  # whoever writes QUENCH_HOME says that it cannot be written
                    Path(folder).mkdir(parents=True, exist_ok=True)
    return said


def _unusable(folder: Path) -> str | None:
    """Why nothing can be kept in a HOME; None where it can."""
    if not folder.is_absolute():
        return f"HOME is not set, and user id {os.getuid()} has no entry in the password file"
    if not folder.is_dir():
        return f"HOME ({folder}) is no folder"
    for place in (folder, folder / ".cache"):  # mounting a volume below .cache makes .cache root's
        if place.exists() and not _writable(place):
            return f"{place} (HOME) cannot be written" if place == folder else f"{place} cannot be written"
    return None


def _keep_reading(old: Path) -> None:
    """Leave where they are the models, tokens and passwords that somebody put into a HOME that cannot be written."""
    stay = dict(READ)
    if "HF_HOME" not in os.environ and "XDG_CACHE_HOME" not in os.environ:  # else its cache was never in HOME
        stay |= {"HF_HOME": HUGGING_FACE} if _writable(old / HUGGING_FACE) else READ_ONLY_HUB
    for variable, place in stay.items():
        if variable not in os.environ and old.is_absolute() and (old / place).exists():
            os.environ[variable] = str(old / place)


def _writable(folder: Path) -> bool:
    """Asked of the kernel, which knows read-only mounts too; nothing is written."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
