# make demo   one mock picture, no key, no network beyond installing
# make smoke  lint, and the first rows of the main tests: half a minute, while you work
# make check  validation, skill format, lint, types, all tests that need light packages only (300 MB)
# make torture  each break of the byte stream, with the program killed there too; leaves its counts below output/
# make check-all  the other tests: the model in process, an engine, the agents, the gallery in a browser (installs 4 GB)
# make fuzz   the properties of tests/fuzz on more than 100,000 cases, others each time; counts them (3 to 10 minutes)
# make install-skill DEST=~/.claude/skills  the skill's folder, directly under DEST
# make package  the skill as a zip in dist/, the same bytes each time
# make standalone  the command for one picture as one file, dist/generate_image.pyz, the same bytes each time
# make audit  the packages against the advisories of PyPI: needs the real index
# make mutants  whether the tests notice small faults in the rooms that hold money and trust (hours; goes on where it was)
# make versions  the main tests with the lowest and the highest versions of Python and packages (half an hour)
# make bench  start-up, one picture and batches: beside the official client, rate, kills, scale (25 minutes; not a test)

VENV := .venv
# Windows, in Git Bash: a venv has other names there, and `python3` is a link to a shop.
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := $(VENV)/Scripts
EXE := .exe
else
PYTHON ?= python3
BIN := $(VENV)/bin
EXE :=
endif
SKILL_NAME := alicloud-ai-image-zimage-turbo
SKILL := skills/ai/image/$(SKILL_NAME)
RESULTS := output/$(SKILL_NAME)
PACKAGE = dist/$(SKILL_NAME)-$(shell sed -n 's/^  version: "\(.*\)"/\1/p' $(SKILL)/SKILL.md).zip
SOURCES := skills tests
TORCH ?= torch==2.13.0
CLIENTS := @anthropic-ai/claude-code@2.1.329 @openai/codex@0.169.0 skills@1.6.0 openai@6.49.0
LITELLM ?= litellm[proxy]>=1.108,<2
XINFERENCE ?= xinference>=4.1,<5
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

export PYTHONUTF8 := 1

# More than two cores: most of a test is waiting for a service that is slow, or for a process.
PYTEST := $(BIN)/python -m pytest --numprocesses 4 --dist worksteal

.PHONY: help demo smoke check check-all torture validate skill lint types test browser middlemen local engines clients audit bench \
	package standalone install-skill clean fuzz mutants versions

help:
	@sed -n 's/^# make/make/p' Makefile

# Two stamps: the demo installs only what the skill needs, the checks what light tests need. Heavy ones have their own.
$(BIN)/python$(EXE):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.skill: requirements.txt | $(BIN)/python$(EXE)
	$(PIP) --constraint requirements.txt requests jsonschema Pillow truststore tqdm
	@touch $@

$(VENV)/.checks: requirements.txt | $(BIN)/python$(EXE)
	$(PIP) --requirement requirements.txt
	@touch $@ $(VENV)/.skill

demo: $(VENV)/.skill
	@PATH="$$PWD/$(BIN):$$PATH" sh tests/demo.sh

smoke: lint
	$(PYTEST) --quiet -m smoke

check: validate skill lint types test

# Beside `make check`, not instead of it: the tests that conftest.py marks as heavy.
check-all: $(VENV)/.checks browser middlemen local engines clients
	$(PYTEST) -m heavy

# Two processes, as all of it is work. CASES=10 tries ten times as many. What fails prints how to play it again.
CASES ?= 1
fuzz: $(VENV)/.checks
	ZIMAGE_FUZZ=$(CASES) $(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/fuzz

# Needs nothing but python3: everything compiles.
validate:
	@mkdir -p $(RESULTS)
	@rm -f $(RESULTS)/validate.txt
	@for f in $(SKILL)/scripts/*.py $(SKILL)/scripts/*/*.py; do PYTHONPYCACHEPREFIX=$(RESULTS)/pycache $(PYTHON) -m py_compile "$$f" || exit 1; done
	@echo "py_compile_ok" > $(RESULTS)/validate.txt
	@echo "py_compile_ok: $(RESULTS)/validate.txt"

# The format's validator needs Python 3.11; on 3.10 our own tests of SKILL.md have to do.
skill: $(VENV)/.checks
	@if [ -x $(BIN)/agentskills ]; then $(BIN)/agentskills validate $(SKILL); \
	else echo "skipped: the skill format's validator needs Python 3.11"; fi

lint: $(VENV)/.checks
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# Held against one system, so that every system gives the same answer: what only POSIX has is guarded when it runs.
types: $(VENV)/.checks
	$(BIN)/mypy --platform linux $(SKILL)/scripts tests

test: $(VENV)/.checks
	$(PYTEST) -m "not heavy and not torture"

# Most of a cell is waiting for a time-out: many at once. What others do in the same cells: tests/torture/peers.py
torture: $(VENV)/.checks
	$(BIN)/python -m pytest --quiet --numprocesses 12 -m torture tests/test_torture.py
	$(BIN)/python tests/torture/peers.py

# The gallery is tested in a real browser. Where it can be installed without asking it is; else those tests are skipped.
browser: $(VENV)/.browser
	@command -v chromedriver >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		export DEBIAN_FRONTEND=noninteractive; apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null; }; \
	fi || echo "no Chromium: the tests of the gallery in a browser will be skipped"

$(VENV)/.browser: requirements-browser.txt $(VENV)/.checks
	@$(PIP) --requirement requirements-browser.txt && touch $@ || \
		echo "no selenium: the tests of the gallery in a browser will be skipped"

# Proxies and a gateway as they are out there, and what gives them names of their own. They are installed as the browser is.
MIDDLEMEN := nginx squid tinyproxy-bin microsocks libnss-wrapper
middlemen:
	@PATH="$$PATH:/usr/sbin"; { command -v nginx && command -v squid && command -v tinyproxy && command -v microsocks && \
		ls /usr/lib/*/libnss_wrapper.so; } >/dev/null 2>&1 || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		export DEBIAN_FRONTEND=noninteractive; apt-get install -qq -y --no-install-recommends $(MIDDLEMEN) >/dev/null || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends $(MIDDLEMEN) >/dev/null; }; \
	fi || echo "no nginx, squid, tinyproxy or microsocks: the tests of real proxies and gateways will be skipped"

# The provider that runs the model in its own process is tested with a tiny model. torch comes first and pinned: a range
# would take the newest build. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives a small one for Linux.
local: $(VENV)/.local

$(VENV)/.local: requirements-local.txt $(VENV)/.checks
	@($(PIP) $(TORCH) && $(PIP) --requirement requirements-local.txt && touch $@) || \
		echo "no torch: the tests that run the model in process will be skipped"

# A server that others run this model with; it draws with the same packages as the provider, on the CPU. It comes with
# torchvision, which is not needed and whose build on PyPI does not load beside a torch without CUDA.
engines: $(VENV)/.xinference

$(VENV)/.xinference: requirements-local.txt Makefile | $(BIN)/python$(EXE)
ifeq ($(shell uname -s),Linux)
	@$(BIN)/python -m venv $(VENV)/xinference && $(VENV)/xinference/bin/python -m pip install --quiet --disable-pip-version-check \
		"$(TORCH)" "$(XINFERENCE)" --requirement requirements-local.txt && \
		$(VENV)/xinference/bin/python -m pip uninstall --quiet --yes timm torchvision && touch $@ || \
		echo "no Xinference: the test of a real engine will be skipped"
endif

# The agents that the skill is installed into by the tests, 770 MB of them. They run offline and without an account.
# And programs that others reach such services with, which the mock is held to.
clients: $(VENV)/.clients $(VENV)/.litellm

$(VENV)/.litellm: Makefile | $(BIN)/python$(EXE)
	@$(BIN)/python -m venv $(VENV)/litellm && $(VENV)/litellm/bin/python -m pip install --quiet --disable-pip-version-check \
		"$(LITELLM)" && touch $@ || echo "no LiteLLM: the tests of the mock with it will be skipped"

$(VENV)/.clients: Makefile
	@npm install --prefix $(VENV)/clients --no-audit --no-fund --loglevel=error $(CLIENTS) >/dev/null && touch $@ || \
		echo "no npm, or no registry: the tests that install the skill into agents will be skipped"

# Strict: a package whose advisories cannot be had counts as a finding, so a mirror of the index gives no false peace.
audit: $(VENV)/audit/bin/pip-audit
	$(VENV)/audit/bin/pip-audit --strict --progress-spinner off --requirement requirements.txt

$(VENV)/audit/bin/pip-audit: | $(BIN)/python$(EXE)
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.7,<3"

# What makes the faults has many packages of its own; the tests run beside it, in the environment that they always have.
mutants: $(VENV)/mutants/.stamp $(VENV)/.checks
	$(VENV)/mutants/bin/python tests/mutation/mutants.py --python $(BIN)/python $(MUTANTS)

$(VENV)/mutants/.stamp: requirements-mutants.txt | $(BIN)/python$(EXE)
	$(BIN)/python -m venv $(VENV)/mutants
	$(VENV)/mutants/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-mutants.txt
	@touch $@

# The lowest and the highest versions of what the skill needs, each in an environment of its own.
versions: | $(BIN)/python$(EXE)
	$(PYTHON) tests/versions.py $(VENV)/versions

bench: $(VENV)/.checks
	$(BIN)/python tests/benchmarks/start_up.py
	$(BIN)/python tests/benchmarks/one_picture.py
	$(BIN)/python tests/benchmarks/batch_speed.py
	$(BIN)/python tests/benchmarks/batch_rate.py
	$(BIN)/python tests/benchmarks/batch_kills.py
	$(BIN)/python tests/benchmarks/batch_scale.py

package:
	@$(PYTHON) tests/package.py $(SKILL) $(PACKAGE)

standalone:
	@$(PYTHON) tests/standalone.py $(SKILL)/scripts dist/generate_image.pyz

# What the package holds, with nothing left of an older version; an output/ beside it stays: pictures were paid for.
install-skill: TO = $(patsubst ~/%,$(HOME)/%,$(DEST))
install-skill: package
	@test -n "$(DEST)" || { echo "say where to: make install-skill DEST=~/.claude/skills" >&2; exit 2; }
	@mkdir -p "$(TO)/$(SKILL_NAME)" && cd "$(TO)/$(SKILL_NAME)" && rm -rf $(filter-out output,$(notdir $(wildcard $(SKILL)/*)))
	@$(PYTHON) -m zipfile --extract $(PACKAGE) "$(TO)"
	@echo "installed: $(TO)/$(SKILL_NAME)"

# Leaves output/ alone: pictures in it were paid for.
clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache
