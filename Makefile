# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

# Says what is missing before anything is installed.
define OLD_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("Quench needs Python 3.11 or newer, and %s is %d.%d.\nName another one: make install PYTHON=python3.12"
             % (sys.executable, *sys.version_info[:2]))
endef
export OLD_PYTHON

# Without its banner: Material for MkDocs is maintained until 5 May 2027; its successor, Zensical, reads the same file.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

ENVIRONMENTS := llmcompressor autoawq autogptq vllm onnx

.PHONY: help install env-llmcompressor env-autoawq env-autogptq env-vllm env-onnx quickstart check audit test test-all test-gpu bench \
        models served folklore gate-years overheads kills fuzz cluster docs site site-serve lock lock-envs clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: .venv/.installed  ## .venv from the lock
.venv/.installed: infra/locks/main.txt pyproject.toml
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -c "$$OLD_PYTHON"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==0.13.9
	@echo "installing from infra/locks/main.txt"
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r infra/locks/main.txt
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

env-llmcompressor: .envs/llmcompressor/.installed  ## .envs/llmcompressor: writes the ct- schemes (compressed-tensors)
env-autoawq: .envs/autoawq/.installed  ## .envs/autoawq: AutoAWQ, archived
env-autogptq: .envs/autogptq/.installed  ## .envs/autogptq: AutoGPTQ, archived
env-onnx: .envs/onnx/.installed  ## .envs/onnx: ONNX Runtime GenAI, serves 4-bit files on CPUs without AVX-512
FLAGS_onnx := $(if $(UV_FIND_LINKS),,--torch-backend cpu)
.envs/%/.installed: infra/locks/%.txt | install
	@test -x .envs/$*/bin/python || $(BIN)/python -m venv --without-pip .envs/$*
	@echo "installing from infra/locks/$*.txt"
	@$(BIN)/uv pip install -q --compile-bytecode --python .envs/$*/bin/python -r infra/locks/$*.txt $(FLAGS_$*)
	@sha256sum infra/locks/$*.txt | cut -c -64 > $@

# Two locks: one for NVIDIA GPUs, one for CPUs. The latter leaves out what is built for CUDA alone, and asks for torch's
# build for CPUs: of a folder of wheels, or of torch's own index.
env-vllm: .envs/vllm/.installed  ## .envs/vllm: the server that `quench serve` starts
.envs/vllm/.installed: infra/locks/vllm.txt infra/locks/vllm-cuda.txt infra/locks/vllm.excludes | install
	@$(BIN)/python -m venv --clear --without-pip .envs/vllm
	@if nvidia-smi -L >/dev/null 2>&1; then lock=infra/locks/vllm-cuda.txt; else lock=infra/locks/vllm.txt; \
	  flags="--excludes infra/locks/vllm.excludes $(if $(UV_FIND_LINKS),,--torch-backend cpu)"; fi; \
	echo "installing from $$lock"; \
	$(BIN)/uv pip install -q --python .envs/vllm/bin/python -r $$lock $$flags && \
	sha256sum $$lock | cut -c -64 > $@

quickstart: install  ## the main job, offline, on the embedded defaults
	@$(BIN)/quench run recipes/quickstart/recipe.yaml

check: install   ## linters, types, import rules, recipes, generated docs, links of the site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --warnings
	$(BIN)/lint-imports
	@for recipe in $(wildcard recipes/*.yaml) recipes/quickstart/recipe.yaml; do $(BIN)/quench check $$recipe --data || exit 1; done
	$(BIN)/python -m flows.commands.docs --check
	$(BIN)/python infra/rooms.py --check
	$(MKDOCS) build --strict --config-file infra/mkdocs.yml
	$(BIN)/hadolint infra/docker/Dockerfile
	$(BIN)/check-jsonschema -q --builtin-schema vendor.compose-spec infra/compose.yaml
	$(BIN)/kubernetes-validate --strict --no-warn --quiet -k 1.34 infra/kubernetes/*.yaml
	@$(BIN)/python infra/audit.py

audit: install   ## known vulnerabilities of what the locks install; says "not audited" where no database is reached
	@$(BIN)/python infra/audit.py

test: install    ## the tests that fit two cores and some ten minutes
	$(BIN)/python -m pytest -n 2 -m "not slow and not system and not gpu"

test-all: install $(ENVIRONMENTS:%=env-%)  ## everything that needs no GPU; installs environments, Debian's Chromium, PostgreSQL and faketime
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium)
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || (apt-get update -qq && apt-get install -y -qq postgresql)
	@ls /usr/lib/*/faketime >/dev/null 2>&1 || (apt-get update -qq && apt-get install -y -qq faketime)
	$(BIN)/python -m pytest -n 2 -m "not gpu"

test-gpu: install  ## what needs an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

bench: install   ## the quickstart timed in an empty home: docs/results/quickstart.md (with a picture where Chromium is)
	$(BIN)/python -m tests.bench.quickstart
	$(BIN)/python -m tests.bench.merge
	$(BIN)/python -m tests.bench.train
	$(BIN)/python -m tests.bench.quantizers
	$(BIN)/python -m tests.bench.evaluation
	$(BIN)/python -m tests.bench.decoding
	$(BIN)/python -m tests.bench.calibration
	$(BIN)/python -m tests.bench.interop
	$(BIN)/python -m tests.bench.scale
	$(BIN)/python -m tests.bench.rows
	$(BIN)/python -m tests.bench.servers
	$(BIN)/python -m tests.bench.memory
	$(BIN)/python -m tests.bench.cards
bench: quickstart env-autoawq env-autogptq  # whose models and readers the last one takes

folklore: install env-llmcompressor  ## what the field repeats, three seeds: docs/results/folklore.md, resumes
	$(BIN)/python -m tests.bench.folklore

gate-years: install  ## 1,000 years of 52 retrains through the gate's rule, simulated: docs/results/gate.md, minutes
	$(BIN)/python -m tests.bench.gate_years

models: install env-llmcompressor  ## a tiny model of each architecture through every step: docs/models.md, resumes
	$(BIN)/python -m tests.bench.models

served: install env-vllm env-llmcompressor  ## the table of engines against the installed vLLM: docs/results/served.md, resumes
	$(BIN)/python -m tests.bench.engines
	$(BIN)/python -m tests.bench.served

kills: install   ## 30 runs, each with a SIGKILL at a random moment: docs/results/operations.md, resumes
	$(BIN)/python -m tests.bench.kills

fuzz: install    ## 15,000 mutated recipes, rows and files of models through check: docs/results/fuzz.md, an hour
	$(BIN)/python -m tests.fuzz.run

overheads: install  ## what the orchestration costs, against one script: docs/results/operations.md, some hours
	$(BIN)/python -m tests.bench.overheads

cluster: install ## one process, two Ray nodes, a bucket: docs/results/cluster.md; needs root
	$(BIN)/python -m tests.bench.cluster

docs: install    ## write the generated pages again
	$(BIN)/python -m flows.commands.docs
	$(BIN)/python infra/rooms.py

site: install    ## README and docs/ as a site: site/index.html; fails on a dead link or anchor
	$(MKDOCS) build --strict --config-file infra/mkdocs.yml

site-serve: install  ## the same on http://127.0.0.1:8000, built again at every change
	@$(MKDOCS) serve --config-file infra/mkdocs.yml --dev-addr 127.0.0.1:8000

lock: install    ## resolve pyproject.toml again
	$(BIN)/uv pip compile -q pyproject.toml --extra dev --extra ray --extra system --no-annotate --no-header \
	  | sed 's/+cpu$$//' > infra/locks/main.new && mv infra/locks/main.new infra/locks/main.txt

lock-envs: install  ## resolve infra/locks/*.in again
	@for name in $(ENVIRONMENTS); do \
	  test $$name != vllm || flags="--excludes infra/locks/vllm.excludes"; \
	  $(BIN)/uv pip compile -q infra/locks/$$name.in $$flags --no-annotate --no-header -o infra/locks/$$name.new >/dev/null \
	  && sed 's/+cpu$$//' infra/locks/$$name.new > infra/locks/$$name.txt && rm infra/locks/$$name.new || exit 1; done
	@env -u UV_FIND_LINKS $(BIN)/uv pip compile -q infra/locks/vllm-cuda.in --no-annotate --no-header \
	  -o infra/locks/vllm-cuda.new >/dev/null && mv infra/locks/vllm-cuda.new infra/locks/vllm-cuda.txt

clean:           ## remove what was installed; .quench/ stays
	rm -rf .venv .envs site .ruff_cache .pytest_cache *.egg-info
