"""A recipe whose base and data lie on a hub: planned, refused, pinned, and run, by a hub on loopback."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import QUICKSTART, write_small_recipe
from tests.flows.test_resume import processes_of
from tests.hub import Hub, read_folder

TOKEN = "hf_TheTokenThatNobodyElseMaySee"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as made:
        recipe = write_small_recipe(tmp_path / "project")
        rows = recipe.with_name("rows.jsonl")
        made.add("org/base", QUICKSTART / "base", gated=True)
        made.add("org/rows", {"train.jsonl": rows.read_bytes(), "README.md": b"# rows"}, dataset=True)
        made.tokens = {TOKEN: {"org/base"}}
        rows.unlink()
        text = recipe.read_text().replace(str(QUICKSTART / "base"), "org/base").replace("rows.jsonl", "org/rows")
        recipe.write_text(text)
        yield made


def env(hub: Hub, folder: Path, **client: Any) -> dict[str, str]:
    return hub.env(folder / "hf", **client) | {"QUENCH_HOME": str(folder / "home"), "QUENCH_CPU_SLOTS": "1"}


def quench(hub: Hub, folder: Path, *words: str, check: int = 0, **client: Any) -> subprocess.CompletedProcess[str]:
    """`quench WORDS[0] RECIPE WORDS[1:]` with its own cache and home below `folder`."""
    command, *rest = words
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", command, "project/recipe.yaml", *rest],
        env=env(hub, folder, **client),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class Plan(NamedTuple):
    """What `quench plan` says: where base and data come from, and the beginning of each step's fingerprint."""

    pins: dict[str, str]
    steps: dict[str, str]


def plan(hub: Hub, folder: Path, *words: str, **client: Any) -> Plan:
    said = quench(hub, folder, "plan", *words, token=TOKEN, **client).stdout
    lines = [line.split() for line in said.splitlines()]
    return Plan(
        pins={line[1]: line[2] for line in lines if line[0] == "pin"},
        steps={line[1]: line[2] for line in lines if line[0] == "make"},
    )


def test_a_plan_is_pinned_and_the_same_offline(hub: Hub, tmp_path: Path):
    base, rows = (hub.repositories[name].branches["main"] for name in ("org/base", "datasets/org/rows"))
    online, before = plan(hub, tmp_path), len(hub.seen)
    assert online.pins == {"base": f"org/base@{base}", "data": f"org/rows@{rows}"} and len(online.steps) > 5
    assert plan(hub, tmp_path, offline=True) == online
    assert len(hub.seen) == before

    # The branch moves: another commit. What reads the rows is another step, in the old commit nothing is.
    data = hub.repositories["datasets/org/rows"]
    lines = data.commits[rows]["train.jsonl"].splitlines(keepends=True)
    commit = data.commit({**data.commits[rows], "train.jsonl": b"".join(lines[:-1])})
    moved = plan(hub, tmp_path)
    assert moved.pins == {**online.pins, "data": f"org/rows@{commit}"}
    assert all(moved.steps[key] != online.steps[key] for key in ("prepare/small", "train/small"))
    assert plan(hub, tmp_path, "--set", f"data.revision={rows}") == online
    # A commit with the same rows is the same input: other files of the repository are no part of it.
    data.commit({**data.commits[rows], "README.md": b"# better"})
    assert plan(hub, tmp_path).steps == online.steps


@pytest.mark.parametrize("command", ["plan", "run"])
def test_base_and_data_are_refused_at_once_before_anything_starts(hub: Hub, tmp_path: Path, command: str):
    done = quench(hub, tmp_path, command, "--set", "data.path=org/rosw", "--json", check=2)
    base, data = json.loads(done.stdout)["problems"]
    assert "is gated, and no token is set" in base["what"] and "HF_TOKEN" in base["next"]
    assert f"{hub.url()}/org/base" in base["next"] and base["where"] == "project/recipe.yaml:3 model.base"
    assert "dataset org/rosw is not there" in data["what"] and data["where"] == "--set data.path=org/rosw data.path"
    assert not any(one.server == "storage" for one in hub.seen)
    assert not (tmp_path / "home" / "prefect").exists()


def test_fetched_rows_and_base_are_checked_like_local_ones(hub: Hub, tmp_path: Path):
    data = hub.repositories["datasets/org/rows"]
    files = data.commits[data.branches["main"]]
    data.commit({"train.jsonl": files["train.jsonl"] + b"not json\n"})
    said = quench(hub, tmp_path, "plan", "--set", "train.targets=[q_prj]", token=TOKEN, check=2).stderr
    assert "train.jsonl:701 is not JSON" in said and "q_prj" in said and "Did you mean q_proj?" in said


def test_check_asks_no_hub(hub: Hub, tmp_path: Path):
    quench(hub, tmp_path, "check", "--data")
    assert hub.seen == []


@pytest.mark.slow
def test_a_run_from_the_hub_keeps_the_token_to_itself(hub: Hub, tmp_path: Path):
    home, log = tmp_path / "home", tmp_path / "printed.txt"
    words = [sys.executable, "-m", "flows.cli", "run", "project/recipe.yaml", "--set", "quantize.schemes=[rtn-w4-g128]"]
    words += ["--set", "measure.enabled=false"]  # it reads what evaluate reads, one after the other
    with log.open("w") as printed:
        run = subprocess.Popen(words, env=env(hub, tmp_path, token=TOKEN), cwd=tmp_path, stdout=printed, stderr=printed)
    others: dict[int, bool] = {}
    while run.poll() is None:
        for pid, program in processes_of(home).items():
            if "tasks.runtime.process.child" in program or "prefect server" in program:
                with contextlib.suppress(OSError):  # it has ended
                    others[pid] = TOKEN.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        time.sleep(0.1)
    assert run.returncode == 0, log.read_text()
    assert len(others) > 5 and not any(others.values()), "the Prefect server and a child a stage"

    steps = json.loads((home / "runs" / "latest" / "steps.json").read_text())
    assert {one["status"] for one in steps["steps"]} == {"made"}
    assert steps["base"]["source"] == f"org/base@{hub.repositories['org/base'].branches['main']}"
    assert steps["data"]["source"] == f"org/rows@{hub.repositories['datasets/org/rows'].branches['main']}"
    kept = read_folder(home)
    assert "mlflow.db" in kept and any(name.endswith("log.txt") for name in kept)
    assert any(name.endswith("manifest.json") for name in kept) and any("prefect.db" in name for name in kept)
    assert [name for name, data in kept.items() if TOKEN.encode() in data] == []
    assert TOKEN not in log.read_text()


def test_an_external_model_is_pinned_as_the_base_is(hub: Hub, tmp_path: Path):
    hub.add("org/prod", QUICKSTART / "base")
    commit = hub.repositories["org/prod"].branches["main"]
    found = plan(hub, tmp_path, "--set", "evaluate.external.prod=org/prod", "--only", "prod")
    assert found.pins["prod"] == f"org/prod@{commit}"
    assert set(found.steps) == {"prepare/small", "rehearse/small", "evaluate/prod", "measure/prod"}
    named = "evaluate.external={prod: {path: org/prod, revision: v9}}"
    said = quench(hub, tmp_path, "plan", "--set", named, token=TOKEN, check=2).stderr
    assert "model org/prod@v9 has no such revision" in said and "evaluate.external.prod" in said


@pytest.mark.slow
def test_a_models_own_code_is_fetched_at_a_commit_where_it_is_allowed(hub: Hub, tmp_path: Path):
    files = read_folder(QUICKSTART / "base")
    config = json.loads(files["config.json"]) | {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}
    files |= {"config.json": json.dumps(config).encode(), "strange.py": b"raise SystemExit('it ran')\n"}
    hub.add("org/strange", files)
    commit = hub.repositories["org/strange"].branches["main"]

    def asked(*more: str, check: int = 0) -> str:
        text = f"evaluate.external.big={{path: org/strange{''.join(f', {one}' for one in more)}}}"
        words = ("plan", "--set", text, "--only", "big", *(("--allow-python", "org/strange") if check < 2 else ()))
        done = quench(hub, tmp_path, *words, token=TOKEN, check=check)
        return done.stdout + done.stderr

    told = asked(f"revision: {commit}", check=2)
    assert "needs code of its own" in told and "trust_remote_code: true" in told
    assert not list((tmp_path / "hf").rglob("strange.py"))
    assert "no commit is named" in asked("trust_remote_code: true", "revision: main", check=2)
    assert "--allow-python org/strange" in asked("trust_remote_code: true", f"revision: {commit}", check=2)
    said = asked("trust_remote_code: true", f"revision: {commit}")
    assert f"org/strange@{commit}" in said and "it ran" not in said
    (fetched,) = (tmp_path / "hf").rglob(f"snapshots/{commit}/strange.py")
    assert fetched.read_bytes() == files["strange.py"]
