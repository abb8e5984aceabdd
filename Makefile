# `make demo` and `make test` each do everything on a fresh machine; a second call installs nothing.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help demo demo-scratch demo-compare test test-fast test-slow fuzz lint format typecheck coverage lock clean-venv

help:
	@echo 'make demo          install if needed, then check, train, test and draw on synthetic data'
	@echo 'make demo-scratch  the same schedule from random weights, to compare with'
	@echo 'make demo-compare  remapped heads, re-initialised heads and random weights side by side'
	@echo 'make test          install if needed, then lint, types and the fast tests'
	@echo 'make test-fast     the tests that failed last time first; stops at the first failure'
	@echo 'make test-slow     the tests that take minutes'
	@echo 'make fuzz          an hour of mutated files against all readers of foreign files'
	@echo 'make coverage      the fast tests, and which lines they reach'
	@echo 'make lint          ruff: rules and format, nothing is changed'
	@echo 'make format        ruff: fix what can be fixed, then format'
	@echo 'make typecheck     mypy'
	@echo 'make lock          resolve requirements.lock again (needs uv)'

$(STAMP): requirements.lock requirements.txt pyproject.toml
	@$(PYTHON) tools/check_platform.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-deps -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo.py --check-weights --train --test
	$(PY) tools/predict.py 'data/demo/VOCdevkit/VOC2012/JPEGImages/demo_val_000*.jpg' \
	  --run work_dirs/demo --proposals 30 --overwrite

demo-scratch: $(STAMP)
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo_scratch.py

demo-compare: $(STAMP)
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo_remap.py --test --head-init remap
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo_remap.py
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo.py --test --head-init reinit
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo.py
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo_scratch.py
	$(PY) tools/compare_runs.py work_dirs/demo_remap work_dirs/demo work_dirs/demo_scratch \
	  --names remap reinit scratch --out work_dirs/demo_comparison

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: $(STAMP)
	$(PY) -m mypy

# As many at a time as there are cores, up to four: each takes up to 2 GB.
test: lint typecheck
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

test-fast: $(STAMP)
	$(PY) -m pytest -x --failed-first

coverage: $(STAMP)
	$(PY) -m pytest --cov=mmfinetune --cov-report=term:skip-covered

test-slow: $(STAMP)
	$(PY) -m pytest -m slow

fuzz: $(STAMP)
	$(PY) -m tests.fuzz --seconds 3600

lock:
	grep -v '^[-.]' requirements.txt | uv pip compile --universal --fork-strategy fewest \
	  --python-version 3.10 --override packaging/overrides.txt --extra dev --no-annotate \
	  --no-header -c - pyproject.toml \
	  | sed -E "s/ ; python_full_version < '3.13'.*$$//" > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean-venv:
	rm -rf $(VENV)
