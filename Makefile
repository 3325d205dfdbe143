# make demo   set everything up, train and test on the digits data, show the result (about 15 minutes on two cores)
# make test   set everything up and run the tests (the lint is make lint)
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
export PYTHONUNBUFFERED = 1
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test lint clean

demo: $(VENV)/ready data/digits
	python tools/demo.py

test: $(VENV)/ready
	python -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: $(VENV)/ready
	ruff check .

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	python -m pip install -r requirements.txt -e .
	touch $@

data/digits: $(VENV)/ready tools/make_digits_coco.py
	python tools/make_digits_coco.py $@

clean:
	rm -rf $(VENV) data/digits demo
