"""compose.yaml and kubernetes/: what the schemas cannot see, and that the linters of `make check` do refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.runtime.process.launch import CHECKOUT
from tests.infra.dockerfile import DOCKERFILE, stages

INFRA = CHECKOUT / "infra"
COMPOSE = INFRA / "compose.yaml"
KUBERNETES = sorted((INFRA / "kubernetes").glob("*.yaml"))
JOB = INFRA / "kubernetes" / "job.yaml"
BIN = Path(sys.executable).parent


def lint(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / words[0]), *map(str, words[1:])], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "file, words, good, bad",
    [
        (COMPOSE, ("check-jsonschema", "--builtin-schema", "vendor.compose-spec"), "shm_size:", "shm_sise:"),
        (JOB, ("kubernetes-validate", "--strict", "-k", "1.34"), "backoffLimit:", "backofLimit:"),
        (DOCKERFILE, ("hadolint",), "python:3.11.14-slim-bookworm", "python"),
    ],
    ids=["compose", "kubernetes", "dockerfile"],
)
def test_a_slip_is_refused(file: Path, words: tuple[str, ...], good: str, bad: str, tmp_path: Path) -> None:
    assert lint(*words, file).returncode == 0
    broken = tmp_path / file.name
    text = file.read_text(encoding="utf-8")
    assert text.count(good) == 1
    broken.write_text(text.replace(good, bad), encoding="utf-8")
    assert lint(*words, broken).returncode != 0


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def test_compose_names_only_what_it_has() -> None:
    written = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    targets = {f"quench:{name}" for name in stages()}
    for name, one in services().items():
        assert set(one.get("depends_on", {})) <= set(written["services"]), name
        mounted = {volume.split(":")[0] for volume in one.get("volumes", []) if volume[0].isalnum()}
        assert mounted <= set(written["volumes"]), name
        if one["image"].startswith("quench:"):
            assert one["image"] in targets, name
            assert (BIN / one["command"][0]).exists() or one["command"][0] == "sh", name
        else:
            assert re.search(r":[^:]*\d", one["image"]), f"{name}: no version"


def test_compose_listens_on_loopback_and_holds_no_password() -> None:
    ports = [port for one in services().values() for port in one.get("ports", [])]
    assert len(ports) == 2 and all(port.startswith("127.0.0.1:") for port in ports)
    secret = re.compile(r"(PASSWORD|SECRET|TOKEN)", re.IGNORECASE)
    values = [
        (f"{name}.{key}", value)
        for name, one in services().items()
        for key, value in one.get("environment", {}).items()
        if secret.search(key) or "://quench:" in str(value)
    ]
    assert len(values) > 5
    for where, value in values:
        assert re.search(r"\$\{[A-Z0-9_]+:[?-]\}", str(value)), where


def documents() -> Iterator[dict[str, Any]]:
    for path in KUBERNETES:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def pods() -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for one in documents() if "template" in one.get("spec", {})]


def test_pods_name_only_what_there_is() -> None:
    there = {(one["kind"], one["metadata"]["name"]) for one in documents()}
    assert len(pods()) == 2
    own = {
        claim["metadata"]["name"]
        for one in documents()
        for claim in one.get("spec", {}).get("volumeClaimTemplates", [])
    }
    for pod in pods():
        volumes = {one["name"] for one in pod["volumes"]} | own
        for one in pod["volumes"]:
            if claim := one.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there
        for container in pod["containers"]:
            assert {one["name"] for one in container["volumeMounts"]} <= volumes
            assert all(("Secret", one["secretRef"]["name"]) in there for one in container["envFrom"])
            assert (BIN / container["args"][0]).exists()


def test_pods_see_as_many_gpus_as_they_are_given() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        env = {one["name"]: one.get("value") for one in container["env"]}
        assert env["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, range(gpus)))
        if "run.processes" in " ".join(container["args"]):
            assert f"run.processes={gpus}" in container["args"]


def test_pods_have_no_rights() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
