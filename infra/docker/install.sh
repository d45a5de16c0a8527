#!/usr/bin/env bash
# Installs into ./.venv, in the folder that holds the checkout's files; needs Python 3.11, the package registry, no root.
#   install.sh packages   what pyproject.toml asks for, at the versions of infra/locks/main.txt, without the test tools
#   install.sh quench     this checkout itself, editable
# The Dockerfile runs it; tests/infra/test_image.py runs the same lines in an empty folder.
set -euo pipefail

case "${1-}" in
  packages)
    python3 -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check uv==0.13.9
    # What torch adds for CUDA is not in the lock: torch itself pins it, to the digit.
    .venv/bin/uv pip install -q --compile-bytecode --python .venv/bin/python \
      --constraint infra/locks/main.txt -r pyproject.toml
    ;;
  quench)
    .venv/bin/uv pip install -q --python .venv/bin/python --no-deps -e .
    ;;
  *)
    echo "usage: infra/docker/install.sh packages|quench" >&2
    exit 2
    ;;
esac
