# make demo    train a small model, forecast, score; pictures at the end (about 8 minutes on 2 cores)
# make test    install what the tests need and run them
# make check   formatting, lint, types, tests: what CI runs
# make format  let ruff rewrite the code
# make clean   remove .venv, runs/demo and caches
#
# Another interpreter: make demo PYTHON=python3.12. Everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := runs/demo

# More settings of the demo's training, such as TRAIN='--train.images 1000'.
TRAIN :=
# Held-out dates of the packaged sample: nine initial times, a day apart.
INITS := 2000-05-30T06:2000-06-07T06:24h
MEMBERS := 8
LEAD_H := 24

.PHONY: demo test check lint types format clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# A stamp per set of extras: nothing is installed again until setup.py, or the set of top-level packages, changes.
NEEDS := setup.py $(wildcard */__init__.py)

# $(call install,EXTRAS): one line that shows what pip is at; the whole output only if it fails.
define install
	@echo "Installing into $(VENV) (first time: a minute or more; torch is the large part)"
	@{ $(PY) -m pip install --progress-bar off --disable-pip-version-check -e '.[$(1)]' 2>&1; echo $$? >$(VENV)/status; } \
	| tee $(VENV)/install.log | while read -r word what rest; do case "$$word" in \
	Collecting|Downloading|Installing) printf '\r  %-11s %-60.60s' "$$word" "$$what $$rest" ;; esac; done; echo
	@if [ "$$(cat $(VENV)/status)" != 0 ]; then tail -n 40 $(VENV)/install.log; echo "The installation failed."; exit 1; fi
endef

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	"Python 3.10 or later is needed; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % (v[0], v[1]))'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.user: $(NEEDS) | $(PY)
	$(call install,plot)
	@touch $@

$(VENV)/.developer: $(NEEDS) | $(PY)
	$(call install,dev$(comma)mpi$(comma)plot)
	@touch $@ $(VENV)/.user

comma := ,

demo: $(VENV)/.user
	@sh -c 'start=$$(date +%s); set -ex; \
	$(PY) -m aeris.train tiny --run-dir $(RUN) $(TRAIN); \
	$(PY) -m aeris.forecast $(RUN) --init $(INITS) --members $(MEMBERS) --batch $(MEMBERS) --lead-h $(LEAD_H) \
	    --sampler.levels 10 --out $(RUN)/forecast.zarr; \
	$(PY) -m aeris.evaluate $(RUN)/forecast.zarr --truth aeris/data/sample --out $(RUN)/scores; \
	{ set +x; } 2>/dev/null; echo "demo finished in $$(($$(date +%s) - start)) s"'

# Two at a time, file by file: most tests need one core, some start ranks of their own.
test: $(VENV)/.developer
	$(PY) -m pytest -n 2 --dist loadfile

check: lint types test

lint: $(VENV)/.developer
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.developer
	$(PY) -m mypy

format: $(VENV)/.developer
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(RUN) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
