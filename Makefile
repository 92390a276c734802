# make demo   the main job on real images: train, export, calibrate, run a line, watch the verdicts
# make test   everything that is checked
# Both set the machine up first (Debian packages, .venv); repeat them as often as you like.
METHOD ?= hvq
MINUTES ?= 30
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

# make bench [BUNDLE=bundles/...]                        speed against torch, delivery, start-up -> docs/bench.md
bench: setup-test
	@PYTHONPATH=tests $(PY) -m measure.bench --out docs/bench.md $(if $(BUNDLE),--bundle $(BUNDLE))

# make soak [MINUTES=30] [SOAK_BUNDLE=bundles/...]      four cameras, an outage, nothing lost -> docs/soak.md
soak: setup-test
	@PYTHONPATH=tests $(PY) -m measure.soak --minutes $(MINUTES) --out docs/soak.md $(if $(SOAK_BUNDLE),--bundle $(SOAK_BUNDLE))

clean:
	rm -rf .venv .cache .lint .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
