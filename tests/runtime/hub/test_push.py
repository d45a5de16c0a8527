"""Pushing a folder to a hub on loopback: what arrives, what is refused, and that a second push goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub, read_folder
from tests.hub_upload import Account

PUSH = """
import sys
from pathlib import Path
from recipes.problem import RecipeError
from tasks.runtime.hub import push
try:
    push.check(sys.argv[2])
    print(*push.push(Path(sys.argv[1]), sys.argv[2]))
except RecipeError as error:
    print(*error.problems, sep="\\n\\n")
    sys.exit(2)
"""
ANNA, READER = "hf_anna", "hf_reader"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as made:
        made.uploads.accounts = {ANNA: Account(name="anna", orgs=("org",)), READER: Account(name="rita", role="read")}
        made.tokens = {ANNA: {"org/taken"}, READER: set()}
        made.add("org/taken", {".gitattributes": b"", "config.json": b'{"other": 1}', "README.md": b"# card"})
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    (made / "adapter").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(os.urandom(300_000))
    (made / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(1000))
    (made / "config.json").write_text("{}")
    (made / "README.md").write_text("---\nlibrary_name: transformers\n---\n# card\n")
    return made


def push(hub: Hub, folder: Path, name: str, *, check: int = 0, **client: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(folder), name],
        env=hub.env(folder.parent / "hf", **client),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == check, f"{done.stdout}\n{done.stderr}"
    assert ANNA not in done.stdout and READER not in done.stdout
    return done.stdout


def files_of(hub: Hub, name: str) -> dict[str, bytes]:
    repository = hub.repositories[name]
    return {path: data for path, data in repository.commits[repository.branches["main"]].items() if path[0] != "."}


def test_every_file_arrives_in_a_new_private_repository(hub: Hub, folder: Path):
    said = push(hub, folder, "org/new", token=ANNA)
    assert said.split() == [f"{hub.url()}/org/new", hub.repositories["org/new"].branches["main"], "True"]
    assert files_of(hub, "org/new") == read_folder(folder)
    assert hub.repositories["org/new"].private
    stored = [one for one in hub.seen if one.server == "storage"]
    assert len(stored) == 2 and not any(one.token for one in stored), "the storage never sees a token"
    assert len(hub.repositories["org/new"].commits) == 2, "its .gitattributes, and all files at once"


def test_the_same_again_sends_nothing(hub: Hub, folder: Path):
    push(hub, folder, "anna/new", token=ANNA)
    before = hub.repositories["anna/new"].branches["main"]
    hub.seen.clear()
    assert push(hub, folder, "anna/new", token=ANNA).split()[1:] == [before, "False"]
    assert not [one for one in hub.seen if one.server == "storage"]
    assert files_of(hub, "anna/new") == read_folder(folder)
    assert hub.repositories["anna/new"].branches["main"] == before, "no empty commit"


def test_a_push_that_broke_off_goes_on(hub: Hub, folder: Path):
    hub.uploads.failing = True
    said = push(hub, folder, "org/new", token=ANNA, check=2)
    assert "403" in said and files_of(hub, "org/new") == {}
    hub.uploads.failing = False
    push(hub, folder, "org/new", token=ANNA)
    assert files_of(hub, "org/new") == read_folder(folder)


def test_other_content_is_never_written_over(hub: Hub, folder: Path):
    before = files_of(hub, "org/taken")
    said = push(hub, folder, "org/taken", token=ANNA, check=2)
    assert "exists, with other content" in said and "README.md, config.json" in said and "/org/taken/settings" in said
    assert files_of(hub, "org/taken") == before


@pytest.mark.parametrize(
    ("name", "token", "says", "remedy"),
    [
        ("org/new", None, "No token is set", "set HF_TOKEN"),
        ("org/new", "hf_nobody", "may not write", "set HF_TOKEN"),
        ("rita/new", READER, "may only read", "write access"),
        ("other/new", ANNA, "belongs to nobody in other", "push to anna/new"),
        ("org/a b", ANNA, "no id of a hub", "ORG/NAME"),
    ],
)
def test_refused_before_anything_is_sent(hub: Hub, folder: Path, name: str, token: str | None, says: str, remedy: str):
    said = push(hub, folder, name, token=token, check=2)
    assert says in said and remedy in said and f"--push {name}" in said
    assert not [one for one in hub.seen if one.method in ("POST", "PUT")]


def test_an_owner_who_lets_nobody_write(hub: Hub, folder: Path):
    hub.uploads.accounts[ANNA].may_write = ("anna",)
    said = push(hub, folder, "org/new", token=ANNA, check=2)
    assert "may not write there" in said and "403" in said and "org/new" not in hub.repositories


def test_a_card_that_the_hub_cannot_read(hub: Hub, folder: Path):
    (folder / "README.md").write_text("---\ntags: [\n---\n")
    assert "README.md" in push(hub, folder, "org/new", token=ANNA, check=2)


def test_offline_and_out_of_reach(hub: Hub, folder: Path):
    assert "HF_HUB_OFFLINE" in push(hub, folder, "org/new", token=ANNA, check=2, offline=True)
