"""Children end with their parent, on every exit path, and leases are held across processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.runtime.gpus import Gpu, visible
from tasks.runtime.process.launch import CHECKOUT, Launcher, child_env
from tasks.runtime.process.leases import Leases, NoSuchLeaseError

# 10 s is what the issue allows from a signal to nothing left; a grace period of 3 s is part of it.
GONE_S = 10.0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + GONE_S
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.05)


def test_exit_code_log_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    log = tmp_path / "log.txt"
    with Launcher() as launcher:
        code = "import os, sys; print(os.environ.get('HF_TOKEN'), os.environ['OMP_NUM_THREADS']); sys.exit(7)"
        argv = ["exec", "--", sys.executable, "-c", code]
        child = launcher.start(argv, env=child_env(threads=3), cwd=tmp_path, log=log)
        assert child.wait(30) == 7
    assert log.read_text() == "None 3\n"


def test_what_a_child_uses_reports_to_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DO_NOT_TRACK", "1")  # a user's own; MLflow takes it for no
    asks = (
        "from mlflow.telemetry.utils import is_telemetry_disabled; from huggingface_hub import constants;"
        "from prefect._internal.analytics.enabled import is_telemetry_enabled;"
        "print(is_telemetry_disabled(), constants.HF_HUB_DISABLE_TELEMETRY, is_telemetry_enabled())"
    )
    env = {name: text for name, text in child_env().items() if name not in ("PYTEST_CURRENT_TEST", "CI")}
    done = subprocess.run([sys.executable, "-c", asks], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False"]


def test_leaving_the_launcher_ends_children_and_grandchildren(tmp_path: Path):
    # a child that ignores SIGTERM and has a child of its own
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True);"
        "time.sleep(600)"
    )
    log = tmp_path / "log.txt"
    with pytest.raises(KeyboardInterrupt), Launcher() as launcher:
        argv = ["exec", "--", sys.executable, "-c", script]
        child = launcher.start(argv, env=child_env(), cwd=tmp_path, log=log)
        while not log.read_text().strip():
            time.sleep(0.05)
        raise KeyboardInterrupt
    wait_gone([child.pid, int(log.read_text())])
    with pytest.raises(InterruptedError):
        launcher.start(argv, env=child_env(), cwd=tmp_path, log=log)


def die_together(script: str, number: signal.Signals, folder: Path) -> None:
    """Run a script that prints the pids of its two children, send it a signal, and see both gone."""
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    pids = [int(one) for one in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    parent.send_signal(number)
    parent.wait()
    wait_gone(pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_die_with_a_killed_parent(tmp_path: Path, number: signal.Signals):
    script = """
import sys, time
from pathlib import Path
from tasks.runtime.process.launch import Launcher, child_env
launcher = Launcher()
argv = ["exec", "--", sys.executable, "-c", "import time; time.sleep(600)"]
pids = [launcher.start(argv, env=child_env(), cwd=Path("."), log=Path("log.txt")).pid for _ in range(2)]
time.sleep(0.5)
print(*pids, flush=True)
time.sleep(600)
"""
    die_together(script, number, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guarded_program_takes_its_own_children_along(tmp_path: Path, number: signal.Signals):
    script = """
import sys, time
from pathlib import Path
from tasks.runtime.process.launch import Launcher, child_env
program = (
    "import subprocess, sys, time;"
    "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True);"
    "time.sleep(600)"
)
log = Path("log.txt")
argv = ["guard", "--", sys.executable, "-c", program]
child = Launcher().start(argv, env=child_env(), cwd=Path("."), log=log)
while not log.exists() or not log.read_text().strip():
    time.sleep(0.05)
print(child.pid, log.read_text(), flush=True)
time.sleep(600)
"""
    die_together(script, number, tmp_path)


def test_a_guarded_programs_exit_code_is_passed_on(tmp_path: Path):
    with Launcher() as launcher:
        for code, wanted in (("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
            argv = ["guard", "--", sys.executable, "-c", code]
            child = launcher.start(argv, env=child_env(), cwd=tmp_path, log=tmp_path / "log.txt")
            assert child.wait(30) == wanted


def test_a_users_tasks_cannot_stand_in_for_ours(tmp_path: Path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('stand-in')")
    log = tmp_path / "log.txt"
    with Launcher() as launcher:
        child = launcher.start(["run", str(tmp_path / "none.json")], env=child_env(), cwd=tmp_path, log=log)
        child.wait(30)
    assert "stand-in" not in log.read_text()
    assert "none.json" in log.read_text()  # ours ran and missed the file


def test_leases_exclude_and_the_whole_machine_waits_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUENCH_CPU_SLOTS", "2")
    leases = Leases(tmp_path)
    got: list[str] = []
    said: list[str] = []

    def whole() -> None:
        with Leases(tmp_path).take(0, say=said.append) as lease:
            got.append(f"whole {lease.cpus}")

    def small() -> None:
        with Leases(tmp_path).take(1, say=said.append):
            got.append("small")

    with leases.take(1) as one, leases.take(1) as two:
        assert sorted(one.cpus + two.cpus) == [0, 1]
        threads = [threading.Thread(target=body) for body in (whole, small)]
        for thread in threads:
            thread.start()
            time.sleep(0.3)
        assert got == []
    for thread in threads:
        thread.join(10)
    assert got == ["whole (0, 1)", "small"]
    assert said == ["waiting for 2 more cpu of 2", "waiting behind another step, for 1 cpu and 0 gpu"]


def gpus(*uuids: str) -> list[Gpu]:
    return [
        Gpu(index=place, uuid=uuid, name="any", total_bytes=1, free_bytes=1, mig=uuid.startswith("MIG"))
        for place, uuid in enumerate(uuids)
    ]


def test_a_gpu_is_leased_by_what_it_is_not_by_its_number(tmp_path: Path):
    """Two containers of one machine share a home: what is 1 here is 0 there."""
    here = Leases(tmp_path, gpus=lambda: visible(gpus("GPU-a", "GPU-b"), None))
    there = Leases(tmp_path, gpus=lambda: visible(gpus("GPU-b"), "GPU-b"))
    stop = threading.Event()
    with here.take(1, 1) as first, here.take(1, 1) as second:
        assert (first.gpus, second.gpus) == ((0,), (1,))
        stop.set()
        with pytest.raises(InterruptedError), there.take(1, 1, stop=stop):
            pass
    with there.take(1, 1) as lease:
        assert lease.gpus == ("GPU-b",)  # a UUID where the variable has UUIDs
        assert child_env(gpus=lease.gpus)["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    with here.take(1, 2) as both:
        assert both.gpus == (0, 1) and child_env(gpus=both.gpus)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_more_gpus_than_there_are_is_refused_not_waited_for(tmp_path: Path):
    two = Leases(tmp_path, gpus=lambda: visible(gpus("GPU-a", "GPU-b"), None))
    with pytest.raises(NoSuchLeaseError) as caught, two.take(1, 3):
        pass
    assert "3 GPUs are wanted at once; 2 are visible" in caught.value.problem.what
    assert caught.value.problem.next.startswith("Set run.processes to 2")
    split = Leases(tmp_path, gpus=lambda: visible(gpus("MIG-a", "MIG-b"), None))
    with pytest.raises(NoSuchLeaseError, match="MIG instances"), split.take(1, 2):
        pass
    with split.take(1, 1) as lease:
        assert lease.gpus == ("MIG-a",)


def test_waiting_for_a_lease_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUENCH_CPU_SLOTS", "1")
    stop = threading.Event()
    with Leases(tmp_path).take(1):
        stop.set()
        with pytest.raises(InterruptedError), Leases(tmp_path).take(1, stop=stop):
            pass
