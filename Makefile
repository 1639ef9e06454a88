# Every target first installs what it needs. Options: MODEL= OUT= BACKEND= PRECISION= PROMPT= PORT=
PYTHON    ?= python3
VENV      ?= .venv
MODEL     ?= demo/checkpoint
OUT       ?= build/$(notdir $(patsubst %/checkpoint,%,$(MODEL:/=)))/bundle
BACKEND   ?= onnxruntime
PRECISION ?= fp32
PROMPT    ?= a red heart, flat style
PORT      ?= 8000
NAME      ?= $(notdir $(patsubst %/checkpoint,%,$(MODEL:/=)))
RANGES    ?= $(dir $(OUT))ranges.safetensors
PROMPTS   ?= calib/prompts/$(if $(filter demo/checkpoint,$(MODEL:/=)),demo,general).txt
NUM_PROMPTS ?= $(if $(filter demo/checkpoint,$(MODEL:/=)),35)
TESTS     ?= tests
STYLED     = $(if $(filter demo/checkpoint,$(MODEL:/=)),--lora demo/lora/sepia.safetensors)
RANGED     = $(if $(filter int8 fp8,$(PRECISION)),--ranges $(RANGES))

export PROMPT  # recipes read it from the environment, because it may hold quotes

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := $(VENV)/.ready-to-test
UI_VENV   ?= .venv-ui
UI     := $(UI_VENV)/bin
PAGED  := $(UI_VENV)/.ready
SCALE_VENV ?= .venv-scale
SCALE  := $(SCALE_VENV)/bin
SCALED := $(SCALE_VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-isa test-slow test-gpu check types export calibrate engines parity bench bench-gpu run serve test-ui test-scale demo-checkpoint clean

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{printf "  %-16s %s\n", $$1, $$2}'
	@echo "Options: MODEL=$(MODEL) OUT=$(OUT) BACKEND=$(BACKEND) PRECISION=$(PRECISION) PROMPT='$$PROMPT'"

setup: $(READY) types  ## make a virtual environment for all other targets, and links for editors

# torch is installed first and alone, so that no later requirement can pull in another build of it. Of what is editable,
# setuptools warns at length that it is (two --quiet).
$(READY): pyproject.toml constraints.txt
	@echo "installing about 3 GB of packages into $(VENV), which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --quiet --constraint constraints.txt --editable ".[dev,rtx,sign]"
	@touch $@

# Triton's interpreter runs the linear-attention kernels in tests. Its 1 GB is needed only there and for
# --linear-attention plugin.
$(TESTED): $(READY)
	$(BIN)/pip install --quiet --quiet --constraint constraints.txt --editable ".[dev,rtx,sign,plugin]"
	@touch $@

# The engines are fp32, built from the fp32 graphs: for fp16, every stage would have to be exported once more.
# Parity comes last, because a certificate is valid for one manifest, and a build that adds artifacts writes a new one.
demo: $(READY)  ## build the demo model, draw a contact sheet, build its engines, prove parity with diffusers
	$(BIN)/ditc build $(MODEL) -o $(OUT)
	$(BIN)/python -m demo.join $(dir $(OUT))sprint/checkpoint
	$(BIN)/ditc build $(dir $(OUT))sprint/checkpoint -o $(dir $(OUT))sprint/bundle
	$(BIN)/python -m demo.draw $(OUT) $(dir $(OUT))sprint/bundle $(STYLED)
	$(BIN)/ditc build $(MODEL) -o $(OUT) --backend tensorrt-rtx
	$(BIN)/ditc parity $(OUT) --against $(MODEL) --seeds 1 --html $(dir $(OUT))parity.html

export: $(READY)  ## export checkpoint MODEL to bundle OUT of ONNX graphs in PRECISION
	$(BIN)/ditc build $(MODEL) -o $(OUT) --precision $(PRECISION) $(RANGED)

run: $(READY)  ## draw PROMPT with bundle OUT; builds it from MODEL if it is not there
	[ -e $(OUT)/manifest.json ] || $(BIN)/ditc build $(MODEL) -o $(OUT)
	$(BIN)/ditc run $(OUT) "$$PROMPT" -o build/out.png

# Two processes with one thread each, which take one test file at a time, keep two cores busy.
test: $(TESTED)  ## run all tests that take a CPU only minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -q --durations=10 -n 2 --dist loadfile

# torch, oneDNN, MKL, OpenBLAS and NumPy are limited to the instructions of a CPU of 2008. ONNX Runtime 1.32 has no such
# switch.
test-isa: $(TESTED)  ## run the same tests with the instructions of an old CPU (except in ONNX Runtime) and four threads
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem \
	NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL" OMP_NUM_THREADS=4 \
	$(BIN)/python -m pytest $(TESTS) -q --durations=10 -n 2 --dist loadfile

test-slow: $(TESTED)  ## run the long tests: full-width layers, random kills
	$(BIN)/python -m pytest $(TESTS) -q --durations=10 -m slow

test-gpu: $(TESTED)  ## run the tests marked gpu; without a GPU they are skipped with the reason
	$(BIN)/python -m pytest $(TESTS) -q -rs -m gpu

check: $(READY) types  ## run ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .types/ditc

# With these links, mypy and editors (Pyright) see the folders as the package `ditc` that they are installed as.
types:
	@mkdir -p .types/ditc
	@for part in runtime export parity calib; do ln -sfn ../../$$part .types/ditc/$$part; done

bench: $(READY)  ## measure the bundle, fidelity, host time and denoiser step time; writes benchmarks/results/
	$(BIN)/ditc build $(MODEL) -o $(OUT)
	$(BIN)/ditc bench $(OUT) --record
	$(BIN)/python -m benchmarks.host_overhead
	$(BIN)/python -m benchmarks.pipeline --model $(MODEL) --bundle $(OUT)
	$(BIN)/python -m benchmarks.denoiser_step --model $(MODEL)

bench-gpu: $(READY)  ## compare engines, ONNX Runtime, diffusers, torch.compile on this GPU; writes benchmarks/results/
	$(BIN)/python -m benchmarks.gpu

calibrate: $(READY)  ## measure ranges of MODEL over PROMPTS into RANGES, for PRECISION=int8 and fp8
	$(BIN)/ditc calibrate $(MODEL) -o $(RANGES) --prompts $(PROMPTS) $(addprefix --num-prompts ,$(NUM_PROMPTS))

engines: PRECISION = fp16
engines: $(READY)  ## build TensorRT-RTX engines of MODEL in PRECISION into OUT, ahead of time
	$(BIN)/ditc build $(MODEL) -o $(OUT) --backend tensorrt-rtx --precision $(PRECISION) $(RANGED)

parity: $(READY)  ## prove that the bundle OUT computes what MODEL computes; writes a page beside it
	$(BIN)/ditc build $(MODEL) -o $(OUT) --precision $(PRECISION) $(RANGED)
	$(BIN)/ditc parity $(OUT) --against $(MODEL) --precision $(PRECISION) --html $(dir $(OUT))parity.html

# Gradio needs pillow<13, and all else is tested with 13. So the page has an environment of its own, on top of the other.
$(PAGED): $(READY) constraints-ui.txt
	$(PYTHON) -m venv --without-pip $(UI_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(UI)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	grep -v '^pillow==' constraints.txt > $(UI_VENV)/constraints.txt
	$(BIN)/pip --python $(UI)/python install --quiet --quiet --constraint $(UI_VENV)/constraints.txt \
	  --constraint constraints-ui.txt --editable ".[ui]"
	@touch $@

serve: $(PAGED)  ## serve bundle OUT, with a page for browsers; builds it from MODEL if it is not there
	[ -e $(OUT)/manifest.json ] || $(BIN)/ditc build $(MODEL) -o $(OUT)
	$(UI)/ditc serve --name $(NAME)=$(OUT) --ui --port $(PORT)

test-ui: $(PAGED)  ## run the tests of the page; those that need Chromium are skipped where it is not installed
	OMP_NUM_THREADS=1 $(UI)/python -m pytest tests/runtime/serving/ui -q -rs --durations=5

# Ray takes about 490 MB, which only these tests need.
$(SCALED): $(READY) constraints-scale.txt
	$(PYTHON) -m venv --without-pip $(SCALE_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(SCALE)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(BIN)/pip --python $(SCALE)/python install --quiet --quiet --constraint constraints.txt \
	  --constraint constraints-scale.txt --editable ".[ray]"
	@touch $@

# Importing all tests takes longer than some of these, so only the files with such tests are named.
test-scale: $(SCALED)  ## run the tests that need Ray
	OMP_NUM_THREADS=1 $(SCALE)/python -m pytest $$(grep -rl --include='test_*.py' 'mark\.scale$$' $(TESTS)) \
	  -q -rs --durations=5 -m scale

demo-checkpoint: $(READY)  ## train demo/checkpoint from scratch (hours on a CPU; resumes)
	$(BIN)/python -m demo.train all

clean:  ## remove build/ and caches, keep the virtual environment
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
