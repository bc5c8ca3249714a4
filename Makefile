# temp_nce: the two commands of the README are `make reproduce` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2

.PHONY: setup reproduce test test-slow check readme docs lab clean help

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

setup: $(READY)  ## make .venv with the pinned versions and this package, editable
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $(READY)

reproduce: setup ## the main job: pre-train on the embedded digits over temperatures and seeds, then the report
	$(BIN)/temp-nce run digits --jobs $(JOBS)
	$(BIN)/temp-nce report digits

SLOW := benchmarks howto theory experiments open
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)

test: setup      ## lessons of the modules' notebooks, then tests/; minutes
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --skip_folder_re '^([_.]|$(subst $(SPACE),|,$(SLOW)))'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"
	@echo "left out, see make test-slow: the tests marked slow, and the notebooks in nbs/: $(SLOW)"

test-slow: setup ## what `make test` leaves out: process killing, clusters, wheels, and all other notebooks
	printf '%s\n' $(SLOW) | OMP_NUM_THREADS=1 xargs -P 2 -I {} $(BIN)/nbdev_test --n_workers 1 --do_print --path nbs/{}
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

check: setup     ## notebooks, modules and README agree (export, clean, readme change nothing); ruff, mypy, the house, the course
	@find nbs temp_nce README.md -type f \( -name '*.ipynb' -o -name '*.py' -o -name '*.md' \) | grep -v checkpoints | sort | xargs sha256sum > $(VENV)/before
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(MAKE) --no-print-directory readme
	@find nbs temp_nce README.md -type f \( -name '*.ipynb' -o -name '*.py' -o -name '*.md' \) | grep -v checkpoints | sort | xargs sha256sum > $(VENV)/after
	@diff $(VENV)/before $(VENV)/after && echo "notebooks, modules and README agree"
	$(BIN)/ruff check temp_nce nbs tests docs
	$(BIN)/mypy
	$(BIN)/python tests/house.py
	$(BIN)/python tests/course.py

readme: setup    ## README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed 's#](\.\./#](#g' | cat -s > README.md.tmp
	@mv README.md.tmp README.md

docs: setup      ## the site in docs/_build/html, from stored outputs; needs Python 3.11 or later
	$(BIN)/python docs/build_site.py docs/_build

lab: setup       ## read the notebooks in jupyterlab
	$(BIN)/jupyter lab nbs

clean:           ## remove the environment and caches; data and results stay
	rm -rf $(VENV) *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
