# `make demo` and `make test` need only Python 3.10+ and make; the first of them creates .venv and fills it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Tests and the demo are small: one thread in each of two processes beats two threads in one.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Benchmarks of time: glibc keeps what is freed, so that no step waits for its memory to be made anew (docs/cost.md).
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

.PHONY: cheaper-options install demo docs flowers gpu-data gpu-campaign test test-slow fuzz packed-size sensitivity-cost architectures quantizers float-function fake-quant deploy-benchmark deploy-operators step-cost schedules directions cheaper ways results results-quick flatness mixed-precision quality style web-demo test-web engine-accuracy clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## quantize a real image classifier to 4 and 2 bits, in a few minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python examples/run_image_classification.py

docs: $(STAMP)  ## the documentation as a site in build/site, from what is here; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

FLOWERS_DATA ?= ../shared/data/flowers102
FLOWERS_MODEL ?= ../shared/data/mobilenet_v2-imagenet
flowers: $(STAMP)  ## MobileNetV2 on Oxford Flowers-102 at 64 pixels, a few minutes on two cores
	OMP_NUM_THREADS=2 $(BIN)/python examples/run_image_classification.py \
	    --model_name_or_path $(FLOWERS_MODEL) --config_overrides '{"classifier_dropout_prob": 0.2}' \
	    --dataset_name $(FLOWERS_DATA) --eval_split test --max_eval_samples 600 --image_size 64 \
	    --do_train --do_eval --output_dir outputs/flowers \
	    --float_epochs 6 --num_train_epochs 4 --learning_rate 1e-3 --lr_scheduler_type cosine \
	    --per_device_train_batch_size 32 --per_device_eval_batch_size 64 \
	    --weight_bits 4 --weight_granularity channel --rho 0.05 --schedule full \
	    --save_strategy no --report_to none --dataloader_pin_memory false

# Two processes share the files, the longest first (tests/conftest.py).
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest $(SHARED) -m "not slow" tests

test-slow: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest $(SHARED) --timeout=7200 -m slow tests

fuzz: $(STAMP)  ## 10,000 damaged packed checkpoints, some minutes
	$(TEST_ENV) $(BIN)/python -m pytest -p no:xdist --timeout=7200 -s -m slow tests/storage/test_damaged_files.py

packed-size: $(STAMP)  ## file, memory and loading time of a packed ViT-B/16, written to benchmarks/results
	$(TEST_ENV) $(BIN)/python -m benchmarks.packed_size.measure

sensitivity-cost: $(STAMP)  ## what `sensitivity` of ResNet-18 costs in evaluation passes, a few minutes of one core
	$(TEST_ENV) $(BIN)/python -m benchmarks.sensitivity_cost.measure

architectures: $(STAMP)  ## write docs/architectures.md from a run over every architecture, about ten minutes
	$(TEST_ENV) $(BIN)/python tests/support/write_architectures.py docs/architectures.md

quantizers: $(STAMP)  ## write docs/quantizers.md; runs that are not in benchmarks/results/quantizers are done first
	$(TEST_ENV) $(BIN)/python -m benchmarks.quantizers.sweep

float-function: $(STAMP)  ## write docs/float_function.md: what conversion and training keep of MobileNetV2
	$(TEST_ENV) $(BIN)/python -m benchmarks.float_function.measure

deploy-benchmark: $(STAMP)  ## docs/deploy.md: every form of its models; what is in benchmarks/results/deploy is done
	$(TEST_ENV) $(BIN)/python -m benchmarks.deploy.measure

deploy-operators: $(STAMP)  ## docs/deploy.md: where the time of ViT-tiny goes, in float and in integers
	$(TEST_ENV) $(BIN)/python -m benchmarks.deploy.operators

FAKE_QUANT := OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.step_cost.fake_quant
OF_TIMM := "timm vit_small_patch16_224" "timm resnet18"
fake-quant: $(STAMP)  ## quantized layers and steps against float and other libraries, on a quiet machine
	$(PIP) install --constraint constraints.txt --editable '.[benchmarks]'
	$(TEST_ENV) $(KEEP_MEMORY) $(FAKE_QUANT) --models $(OF_TIMM)
	$(TEST_ENV) $(FAKE_QUANT) --models $(OF_TIMM) --skip-layers --output benchmarks/results/fake_quant_default_allocator.json
	$(TEST_ENV) $(KEEP_MEMORY) $(FAKE_QUANT) --models "transformers ViT-S/16" "transformers ResNet-18" --skip-layers \
		--output benchmarks/results/fake_quant_transformers.json
	$(TEST_ENV) $(KEEP_MEMORY) OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.step_cost.step_profile

OPTION := $(TEST_ENV) $(BIN)/python -m benchmarks.accuracy.options.measure --processes 2 --methods qat --option
cheaper-options: $(STAMP)  ## accuracy with options that make steps cheaper; the page is that of step-cost
	$(OPTION) share_inputs --seeds 0 1 2 3 4 5
	$(OPTION) learn_input_scale
	$(OPTION) learn_input_scale --first_last_bits 0

STEP_COST := $(TEST_ENV) $(KEEP_MEMORY) $(BIN)/python -m benchmarks.step_cost.sweep
PRESET_WAYS := --ways qat "qat again" full "ascent 1/8" previous
TASK_WAYS := $(PRESET_WAYS) "echo 2" "last eighth" "last sixth" head "last quarter, every 2nd step" \
	"interval 2, ascent 1/4"
FEW := --rounds 4 --steps 1
step-cost: $(STAMP)  ## docs/cost.md: time and memory of a step against plain QAT, with growth; about half an hour
	$(STEP_COST) --models vit-small-images
	$(STEP_COST) --models vit-small-images resnet18-small-images --batch_sizes 4 64 $(PRESET_WAYS)
	$(STEP_COST) --models resnet18-small-images $(PRESET_WAYS)
	$(STEP_COST) --models mobilenetv2-64 --batch_sizes 32 --rounds 8 --steps 2 $(TASK_WAYS)
	$(STEP_COST) --models vit-tiny-112 --batch_sizes 32 --rounds 5 --steps 2 $(TASK_WAYS)
	$(STEP_COST) --models vit-tiny resnet18 --batch_sizes 16 $(FEW) $(PRESET_WAYS)
	$(STEP_COST) --models vit-small --batch_sizes 8 $(FEW) $(PRESET_WAYS)
	$(STEP_COST) --models vit-base resnet50 --batch_sizes 2 $(FEW) $(PRESET_WAYS)
	$(TEST_ENV) $(KEEP_MEMORY) $(BIN)/torchrun --nproc_per_node 2 -m benchmarks.step_cost.sweep \
	    --models vit-small-images $(PRESET_WAYS)
	$(BIN)/python -m benchmarks.step_cost.page

schedules: step-cost  ## write docs/schedules.md; runs that are not in benchmarks/results/schedules are done first
	$(TEST_ENV) $(BIN)/python -m benchmarks.schedules.sweep

directions: $(STAMP)  ## docs/directions.md: where a cheap perturbation points, on two pretrained models; some minutes
	$(TEST_ENV) $(BIN)/python -m benchmarks.accuracy.directions.measure --task flowers --bits 4
	$(TEST_ENV) $(BIN)/python -m benchmarks.accuracy.directions.measure --task flowers-vit --bits 4 \
	    --lr 3e-4 --steps 60 --rho 0.03

cheaper: $(STAMP)  ## docs/cheaper.md: cheap perturbations tried on pretrained models; what is stored is not run again
	$(TEST_ENV) $(BIN)/python -m benchmarks.accuracy.cheaper.search --processes 2
	$(BIN)/python -m benchmarks.accuracy.cheaper.page

ways: $(STAMP)  ## write docs/ways.md; runs that are not in benchmarks/results/ways are done first, about half an hour
	$(TEST_ENV) $(BIN)/python -m benchmarks.ways.sweep

ACCURACY := $(BIN)/python -m benchmarks.accuracy.sweep --processes 2
# Float models differ between machines in the last bits: on another one than that of the stored runs, name other seeds.
SEEDS ?= 10 11 12 13 14
DIGITS := --tasks digits --seeds 0 1 2 3 4 5 6 7 8 9
results: $(STAMP)  ## write docs/results.md; runs that are not in benchmarks/results/accuracy are done first, for hours
	$(TEST_ENV) $(ACCURACY) $(DIGITS)
	$(TEST_ENV) $(ACCURACY) $(DIGITS) --bits 2 --methods qat "case 3" --images_per_class 5 10 30 60 90
	$(TEST_ENV) $(ACCURACY) $(DIGITS) --bits 2 --methods "qat, distilled" "case 3, distilled"
	$(TEST_ENV) $(ACCURACY) --tasks flowers cifar-resnet cifar-vit --seeds $(SEEDS)
	$(BIN)/python -m benchmarks.accuracy.page
	$(BIN)/python tests/support/readme_table.py

FLATNESS := $(BIN)/python -m benchmarks.accuracy.minima.flatness
MINIMA_PAGE := $(BIN)/python -m benchmarks.accuracy.minima.page
MINIMA_METHODS := --methods qat "case 3" echo "qat, twice the steps"
flatness: $(STAMP)  ## write docs/flatness.md; runs that are not in benchmarks/results/minima are done first, an hour
	$(TEST_ENV) $(FLATNESS) --settings digits:2 digits-cnn:3 $(MINIMA_METHODS) --seeds 0 1 2 3 4 5 6 7
	$(TEST_ENV) $(FLATNESS) --settings cifar-resnet:3 --methods qat "case 3" --seeds 0 1 2 3 4
	$(MINIMA_PAGE)

mixed-precision: $(STAMP)  ## the same page, with bits by budget against uniform bits
	$(TEST_ENV) $(BIN)/python -m benchmarks.accuracy.minima.bit_budget --settings cifar-resnet:3 flowers:3 --seeds 0 1 2 3 4
	$(MINIMA_PAGE)

engine-accuracy: $(STAMP)  ## docs/engine_accuracy.md: exports on ONNX Runtime and OpenVINO, with and without VNNI
	$(TEST_ENV) $(BIN)/python -m benchmarks.accuracy.engines.measure

results-quick: $(STAMP)  ## train a part of docs/results.md anew and compare, a few minutes
	$(TEST_ENV) $(BIN)/python -m benchmarks.accuracy.quick

gpu-data: $(STAMP)  ## pack images and weights for gpu-campaign into one file of at most 40 MB; trains for some minutes
	$(TEST_ENV) $(KEEP_MEMORY) $(BIN)/python -m benchmarks.accuracy.portable pack

# On a machine with a card that has its own Python: make gpu-campaign GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-campaign:  ## what wants a GPU, in under nine minutes on one card: tests, costs, training; writes docs/gpu.md
	HF_HUB_OFFLINE=1 PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu_campaign.campaign
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu_campaign.page

NPM_INSTALL := npm install --prefix web --ignore-scripts --no-package-lock --no-audit --no-fund --loglevel=error
WEB_RUNTIME := web/node_modules/onnxruntime-web/package.json
WEB_DRIVER := web/node_modules/puppeteer-core/package.json
$(WEB_RUNTIME): web/package.json
	$(NPM_INSTALL) --omit=dev
	touch $@
$(WEB_DRIVER): web/package.json
	$(NPM_INSTALL)
	touch $@ $(WEB_RUNTIME)

PORT ?= 8000
web-demo: $(STAMP) $(WEB_RUNTIME)  ## draw digits in the browser: float, W4A4 and W2A2 side by side; needs npm
	OMP_NUM_THREADS=1 $(BIN)/python web/build.py
	@echo "http://127.0.0.1:$(PORT)/ shows it, until Ctrl-C"
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory outputs/web-demo/page

test-web: $(STAMP) $(WEB_DRIVER)  ## exports in transformers.js under node, the demo in Chromium; needs npm and Chromium
	$(TEST_ENV) $(BIN)/python -m pytest -p no:xdist tests/web

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
