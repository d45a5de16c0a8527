"""The start-up hook completes one command and no other."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.service.deployments import FLOWS, NAME, POOL
from flows.service.prefect_plugin import NAMES, complete
from tasks.runtime.process.launch import CHECKOUT

RUN = ["/bin/prefect", "deployment", "run"]
HERE = Path("/here")
ADDED = ["--job-variable", "working_dir=/here"]


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_command_is_completed(name: str):
    argv = [*RUN, name, "--param", "recipe=recipe.yaml", "--watch"]
    assert complete(argv, HERE)
    assert argv == [*RUN, f"{name}/default", *ADDED, "--param", "recipe=recipe.yaml", "--watch"]


def test_the_full_name_gets_the_folder_and_a_named_folder_stays():
    argv = [*RUN, "finetune-and-quantize/default", "--job-variable", "working_dir=/there"]
    assert complete(argv, HERE)
    assert argv == [*RUN, "finetune-and-quantize/default", "--job-variable", "working_dir=/there"]
    argv = [*RUN, "finetune-and-quantize/default"]
    assert complete(argv, HERE)
    assert argv == [*RUN, "finetune-and-quantize/default", *ADDED]


@pytest.mark.parametrize(
    "words",
    [
        ["prefect", "deployment", "run", "another"],
        ["prefect", "deployment", "run", "finetune-and-quantize/nightly"],
        ["prefect", "deployment", "inspect", "finetune-and-quantize"],
        ["prefect", "deployment", "run"],
        ["prefect", "version"],
        ["pytest", "deployment", "run", "finetune-and-quantize"],
        ["prefect"],
    ],
)
def test_nothing_else_is_touched(words: list[str]):
    argv = list(words)
    assert not complete(argv, HERE)
    assert argv == words


def test_without_quench_up_the_command_says_what_to_start(tmp_path: Path):
    (tmp_path / "pyproject.toml").write_text("[tool.prefect.plugins]\nenabled = true\n")
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    words = [str(Path(sys.executable).with_name("prefect")), "deployment", "run", "finetune-and-quantize"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "run `quench up` here" in done.stderr and str(tmp_path / ".quench") in done.stderr
    assert not done.stdout


def test_names_and_prefect_yaml_are_those_that_quench_up_registers():
    assert [one.name for one in FLOWS] == list(NAMES)
    declared = yaml.safe_load((CHECKOUT / "infra" / "prefect.yaml").read_text())
    assert [one["entrypoint"] for one in declared["deployments"]] == [
        f"{one.fn.__module__}.{one.fn.__name__}" for one in FLOWS
    ]
    assert {one["name"] for one in declared["deployments"]} == {NAME}
    assert {one["work_pool"]["name"] for one in declared["deployments"]} == {POOL}
