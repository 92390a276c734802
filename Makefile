# make demo   the main job on real images: train, export, calibrate, run a line, watch the verdicts
# make test   everything that is checked
# Both set the machine up first (Debian packages, .venv); repeat them as often as you like.
METHOD ?= hvq
PY := .venv/bin/python

.PHONY: demo test lint bench soak clean setup setup-test

setup:
	@.ci/setup demo

setup-test:
	@.ci/setup test

demo: setup
	@.ci/demo $(METHOD)

lint: setup-test
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check -q .
	@.venv/bin/lint-imports
	@mkdir -p .lint && ln -sfn .. .lint/andon && MYPYPATH=.lint .venv/bin/mypy -p andon.calib -p andon.runtime -p andon.train -p andon.export -m andon.cli

test: lint
	@OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest

bench: setup-test
	@.ci/bench

soak: setup-test
	@$(PY) -m andon.cli soak

clean:
	rm -rf .venv .cache .lint .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
