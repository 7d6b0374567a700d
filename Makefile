.PHONY: check ci site lint types test quick vectors bench gpu-proof fuzz lowest
check: lint types test
lint:
	ruff check .
	ruff format --check .
types:
	mypy
# All tests but those of `make ci`, or those whose names match: make test T=rms_norm
test:
	python -m pytest -q -n 2 --dist worksteal -m "not ci" -k "$(T)"
# What takes minutes, after `make check`: the page in a browser, the Triton kernels without a GPU, every planted fault; changed
# files; the oldest packages.
ci:
	python -m pytest -q -n 2 --dist loadfile -m ci
	python tests/fuzz/fuzz.py --cases 8000
	$(MAKE) lowest
	$(MAKE) site
# The documentation site, into build/site (extra `docs`): every warning is an error, and links are followed.
site:
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict
# Under a minute once the kernels are compiled: the specification, every backend on its vectors, files, scoring.
QUICK = arith spec_document docs vectors imports linear conformance verify planted_faults \
	checkpoint tokenizer perplexity smooth eval_data eval_score eval_golden eval_results
quick: lint types
	python -m pytest -q -x -k "not another_environment" $(QUICK:%=tests/test_%.py)
# The test vectors again, in place. The same bytes with the versions that their sources name; otherwise the list is of what changed.
vectors:
	python tools/make_vectors.py operations models small
	git status --short tests/vectors
# Speed on this machine, beside whatever else is installed, into benchmarks/results.
bench:
	python benchmarks/cpu.py
	python benchmarks/length.py
	python benchmarks/batch.py
# What a CPU can prove of the Triton kernels (docs/GPU.md): an hour or two.
gpu-proof:
	TRITON_INTERPRET=1 python -m refmamba verify --quick --backend triton
	TRITON_INTERPRET=1 python -m pytest -q tests/test_triton_interpreter.py
	python -m pytest -q tests/test_triton_ptx.py
	python benchmarks/gpu.py --dry-run --out build/gpu.json
	for arch in sm_80 sm_90 sm_120; do python tools/compile_kernels.py build/ptx/$$arch --arch $$arch || exit 1; done
# Changed files of every kind, 100,000 of them, read in process: some minutes. The short form: make fuzz FUZZ="--seconds 60"
FUZZ = --cases 100000
fuzz:
	python tests/fuzz/fuzz.py $(FUZZ)
# The oldest packages, in an environment of their own.
LOWEST = arith checkpoint tokenizer hub perplexity eval_data eval_results linear vectors options session
lowest:
	python -m venv .venv-lowest
	.venv-lowest/bin/pip install -q -c constraints-lowest.txt -e . pytest hypothesis pyarrow matplotlib mpmath
	.venv-lowest/bin/python -m pytest -q -k "not torch" -W default $(LOWEST:%=tests/test_%.py)
