# make demo   set everything up, train and test on the digits data, show the result (about 15 minutes on two cores)
# make test   set everything up and run the tests (the lint is make lint)
# make test STACK=official   the same with what requirements-official.txt lists, in .venv-official
# make site   build the documentation as a site, in site/, and check its links
ifeq ($(STACK),)
REQUIREMENTS = requirements.txt
VENV ?= .venv
PYTHON ?= python3
else
REQUIREMENTS = requirements-$(STACK).txt
VENV ?= .venv-$(STACK)
# The first that is there and that the old releases know
PYTHON ?= $(shell for minor in 10 11 12; do python3.$$minor -c '' 2>/dev/null && echo python3.$$minor && break; done)
endif
WORKERS ?= 2
export PYTHONUNBUFFERED = 1
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test lint site clean

demo: $(VENV)/ready data/digits
	python tools/demo.py

test: $(VENV)/ready
	python -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: $(VENV)/ready
	ruff check .

site: $(VENV)/site
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

$(VENV)/site: docs/requirements.txt $(VENV)/ready
	python -m pip install -r $<
	touch $@

$(VENV)/ready: $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	python -m pip install -r $(REQUIREMENTS) -e .
	touch $@

data/digits: $(VENV)/ready tools/dataset_converters/make_digits_coco.py tools/dataset_converters/composer.py
	python tools/dataset_converters/make_digits_coco.py $@

clean:
	rm -rf $(VENV) data/digits demo site
