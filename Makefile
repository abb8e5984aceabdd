# `make demo` and `make test` each do everything on a fresh machine; a second call installs nothing.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help demo demo-scratch demo-compare test test-slow lint lock clean-venv

help:
	@echo 'make demo          install if needed, then check, train, test and draw on synthetic data'
	@echo 'make demo-scratch  the same schedule from random weights, to compare with'
	@echo 'make demo-compare  remapped heads, re-initialised heads and random weights side by side'
	@echo 'make test          install if needed, then lint and the fast tests'
	@echo 'make test-slow     the tests that take minutes'
	@echo 'make lock          work out requirements.lock anew (needs uv)'

$(STAMP): requirements.lock requirements.txt pyproject.toml
	@$(PYTHON) tools/check_platform.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-deps -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo.py --check-weights
	$(PY) tools/train_pretrained.py configs/mask_rcnn_demo.py
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

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m pytest

test-slow: $(STAMP)
	$(PY) -m pytest -m slow

lock:
	grep -v '^[-.]' requirements.txt | uv pip compile --universal --fork-strategy fewest \
	  --python-version 3.10 --override packaging/overrides.txt --extra dev --no-annotate \
	  --no-header -c - pyproject.toml \
	  | sed -E "s/( and)? ?platform_machine == 'x86_64' and sys_platform == 'linux'//; s/ *; *$$//" \
	  | grep -v ">= '3.1[34]'" > requirements.lock

clean-venv:
	rm -rf $(VENV)
