# Everything sets itself up: only Python >= 3.10, make and a package index are needed.
PYTHON ?= python3
# The allocator keeps its memory: on a virtual machine, page faults can cost more than the arithmetic. Bytecode is kept,
# whatever the environment says: tests start hundreds of processes.
RUN := PYTHONDONTWRITEBYTECODE= MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 THP_MEM_ALLOC_ENABLE=1 .venv/bin/python
CONSTRAINTS := tools/constraints.txt
DATA := build/home_assistant

.PHONY: test suite test-fast test-gpu mutants chaos lint fmt kernels bench demo compare clean

# T: a test file or folder; all where it is left out. With -j2 both at once.
test: lint suite

suite: .venv/installed
	$(RUN) -m pytest $(or $(T),-n auto --dist worksteal)
	$(if $(T),,$(if $(wildcard /dev/nvidiactl /dev/kfd),$(MAKE) test-gpu))

# The kernels on a GPU: a process of its own, for Triton interprets everything or nothing.
test-gpu: .venv/installed
	TRITON_INTERPRET=0 $(RUN) -m pytest $(or $(T),tests/gpu -n 12 --dist worksteal)

test-fast: .venv/installed
	$(RUN) -m pytest -n auto --dist worksteal -m "not slow"

# M: a module, or several in quotes; all where it is left out. N: mutants of each.
mutants: .venv/installed
	.venv/bin/python -m tools.mutants $(M) --count $(or $(N),20)

# KILLS: of trainings, savings and merges, at random times; what is left has to end with the unbroken bytes.
chaos: .venv/installed
	$(RUN) -m tests.esft.chaos --kills $(or $(KILLS),200)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

fmt: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Every Triton kernel through the real compiler, for GPUs that need not be there; hours for all: OPTIONS="--targets sm_90".
kernels: .venv/installed
	.venv/bin/python -m tools.compile_kernels $(OPTIONS)

bench: .venv/installed
	$(RUN) -m pytest benchmarks
	$(RUN) -m benchmarks layer $(OPTIONS)

demo: .venv/installed $(DATA)/test.jsonl
	$(RUN) -m examples.demo --data $(DATA) --out build/demo

compare: .venv/installed $(DATA)/test.jsonl build/general.jsonl
	$(RUN) -m examples.compare --data $(DATA) --general build/general.jsonl --out build/compare

$(DATA)/test.jsonl: .venv/installed
	$(RUN) -m examples.home_assistant --out $(DATA)

build/general.jsonl: .venv/installed
	$(RUN) -m examples.general --out $@

# torch goes first and alone, so that what depends on it takes this one.
.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile -c $(CONSTRAINTS) torch==2.13.0
	.venv/bin/pip install --quiet --no-compile -c $(CONSTRAINTS) -e '.[triton,lora,plot,examples,dev]'
	touch $@

clean:
	rm -rf build .venv
