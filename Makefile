# `make` lists the targets. The first one that needs it sets up .venv (uv inside, nothing outside).
BIN := .venv/bin
READY := .venv/.ready
NOTEBOOKS := $(basename $(notdir $(wildcard notebooks/*.ipynb)))
RUNS := $(patsubst ~/%,$(HOME)/%,$(or $(STAA_RUNS),runs))
CORE := neuron attention variants tracing fused gpu cuda cuda_graph torch_tools networks by_hand memory resident synchronisation train

.DEFAULT_GOAL := help
.PHONY: help setup all list test oldest bench docs site lock refresh clean $(NOTEBOOKS)

help:            ## list the targets
	@echo "make NAME executes notebooks/NAME.ipynb on the embedded data: $(NOTEBOOKS)"
	@echo "  more parameters: make table1 ARGS='-p preset short -p dataset cifar10'"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(READY)  ## set up .venv (the other targets do it when needed)

$(READY): requirements.txt pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; python3 is $$(python3 -V 2>&1)."; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null 2>&1 || python3 -m venv .venv || { rm -rf .venv; echo "python3 could not make .venv; on Debian and Ubuntu: apt install python3-venv."; exit 1; }
	$(BIN)/python -m pip install --quiet "uv>=0.8"
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet -r requirements.txt
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps -e .
	@touch $@

$(NOTEBOOKS): $(READY)
	@mkdir -p "$(RUNS)"
# Beside it first: what was executed before stays, should this one fail.
	JUPYTER_PATH= $(BIN)/papermill --cwd notebooks --log-output --no-progress-bar notebooks/$@.ipynb "$(RUNS)/$@.unfinished.ipynb" $(ARGS)
	@mv "$(RUNS)/$@.unfinished.ipynb" "$(RUNS)/$@.ipynb"

all: $(READY)    ## every table and figure on the embedded data, and figures/index.html with all of them
	$(BIN)/python -m staa.page

list: $(READY)   ## each notebook, its cost, and how many of its runs have a record
	@$(BIN)/python -m staa.page list

test: $(READY)   ## the test suite, and nbval over every notebook
# Three on two cores, since many a test waits; a thread each, or they wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal
	dir=$$(mktemp -d) && export STAA_RUNS=$$dir/runs STAA_FIGURES=$$dir/figures OMP_NUM_THREADS=1 && $(BIN)/python -m staa.page train && \
		$(BIN)/python -m pytest -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout=1200 notebooks; status=$$?; rm -rf $$dir; exit $$status

oldest: $(READY) ## the core's tests with the oldest torch, torchvision and NumPy that pyproject.toml admits
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-oldest
	VIRTUAL_ENV=.venv-oldest $(BIN)/uv pip install --quiet --no-config --resolution lowest-direct -r pyproject.toml
	VIRTUAL_ENV=.venv-oldest $(BIN)/uv pip install --quiet --no-config pytest hypothesis scipy safetensors scikit-learn tonic
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(foreach part,$(CORE),tests/test_$(part).py)

bench: $(READY)  ## the benchmarks: about ten minutes; writes benchmarks/README.md
	cd benchmarks && for part in speed step scaling loader events report; do ../$(BIN)/python $$part.py || exit 1; done

docs: $(READY)   ## the API page, site/api/index.html, from docstrings
	@$(BIN)/python tools/publish.py docs

site: $(READY)   ## site/index.html: all notebooks as they are stored, the page of `make all`, the API
	@$(BIN)/python tools/publish.py

lock: $(READY)   ## renew requirements.txt from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate --no-header \
		--upgrade pyproject.toml --output-file requirements.txt

refresh: $(READY) ## execute every notebook in place: the outputs that are committed
	$(BIN)/jupyter nbconvert --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

clean:           ## remove .venv (runs/ and figures/ stay)
	rm -rf .venv .venv-oldest
