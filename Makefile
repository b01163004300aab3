# Every target can be run again: it does what is missing and keeps the rest.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# The book shows scale cpu, on a machine with a GPU too.
book test notebooks: export FTLIB_SCALE ?= cpu

.DEFAULT_GOAL := help
.PHONY: help book html pdf test lint generate notebooks lab gpu bench results lock

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

book: $(INSTALLED)  ## install, run the notebooks, build the book in _build/html
	$(BIN)/python book/tools/execute.py
	$(BIN)/python book/tools/build.py --notebooks _build/notebooks

html: $(INSTALLED)  ## build the book from the stored outputs
	$(BIN)/python book/tools/build.py

pdf: html  ## print the built book into _build/book.pdf
	$(BIN)/python book/tools/pdf.py

test: lint html  ## lint, types, static gate, book build, then all tests and notebooks
	TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 \
	$(BIN)/python -m pytest tests notebooks \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=900 \
		--nbval-sanitize-with notebooks/sanitize.cfg --ignore notebooks/exercises

lint: $(INSTALLED)  ## ruff, mypy and the notebooks' static gate
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python book/tools/gates.py

generate: $(INSTALLED)  ## write environment.yml, notebooks' first cells, mirror, exercises
	$(BIN)/python book/tools/generated.py

notebooks: generate  ## run the notebooks and store their outputs in notebooks/
	$(BIN)/python book/tools/execute.py --in-place
	$(BIN)/python book/tools/generated.py

lab: $(INSTALLED)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

gpu: $(INSTALLED)  ## run every method and benchmark at scale gpu and record the results
	for script in vocabulary_head decomposition head_adamw; do \
		$(BIN)/python benchmarks/$$script.py --scale gpu || exit 1; \
	done
	$(BIN)/ftlib run cgm --scale gpu --seeds 3 --experiment tales
	$(BIN)/ftlib run cft --scale gpu --seeds 3 --experiment gsm8k
	$(BIN)/ftlib run cft --scale gpu --seeds 1 --experiment gsm8k-learning-rate
	for model in opus-mt-en-fr smollm2-135m; do for task in esnli comve cose; do \
		$(BIN)/ftlib run caref --scale gpu --seeds 10 \
			--experiment "48-shot $$task $$model" || exit 1; \
	done; done
	for language in javanese buginese; do \
		$(BIN)/ftlib run ctsft --scale gpu --seeds 3 \
			--experiment "nusax smollm2-135m $$language" || exit 1; \
	done
	$(BIN)/ftlib run ctsft --scale gpu --seeds 1 \
		--experiment "nusax-discovery smollm2-135m"
	for experiment in distillation reasoners "tidybot words"; do \
		$(BIN)/ftlib run clipr --scale gpu --seeds 3 \
			--experiment "$$experiment smollm2-135m" || exit 1; \
	done
	$(BIN)/ftlib run cgm --scale gpu --seeds 3

# trl and verl ask for other versions of transformers; what is compared needs neither.
bench: $(INSTALLED)  ## install the vocabulary head's peers, time it beside them
	$(BIN)/python -m pip install -c requirements.lock -e '.[bench]'
	$(BIN)/python -m pip install --no-deps trl==1.16.0 verl==0.9.1
	$(BIN)/python benchmarks/vocabulary_head.py

results: $(INSTALLED)  ## print the recorded results
	$(BIN)/ftlib results

lock: $(INSTALLED)  ## write requirements.lock from what .venv holds
	$(BIN)/python book/tools/lock.py

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
		sys.exit(None if (3, 11) <= v < (3, 14) else f"$(PYTHON) is Python {v[0]}.{v[1]}," \
		" but ftlib needs 3.11, 3.12 or 3.13: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c requirements.lock -e '.[book,dev,models]'
	@touch $@
