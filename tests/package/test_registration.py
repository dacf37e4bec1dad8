"""transformers knows our method in whatever order things are imported, and `import hf_saq` alone imports nothing."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from processes import HANGS
from tiny_models import images, vit

from hf_saq.registration import register_when_loaded

# The mechanism, with a package made up for the purpose -------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch) -> Path:
    """A package `slow_library` and an extension of it, `extends_it`, that appends to its list at its end."""
    (tmp_path / "slow_library").mkdir()
    (tmp_path / "slow_library" / "__init__.py").write_text("")
    (tmp_path / "slow_library" / "core.py").write_text("known = []\nloaded = True\n")
    (tmp_path / "extends_it.py").write_text(
        "from slow_library.core import known, loaded\nassert loaded\nknown.append('ours')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))  # our own finder may be waiting there
    yield tmp_path
    for name in ("slow_library", "slow_library.core", "extends_it"):
        sys.modules.pop(name, None)


def core():
    return importlib.import_module("slow_library.core")


def waiting() -> list[object]:
    return [finder for finder in sys.meta_path if type(finder).__module__ == "hf_saq.registration"]


STEPS = {"slow_library.core": "extends_it"}


def test_before_the_library(library):
    register_when_loaded(STEPS)
    importlib.import_module("slow_library")
    assert "extends_it" not in sys.modules and len(waiting()) == 1
    assert core().known == ["ours"]
    assert not waiting()


def test_after_the_library(library):
    assert core().known == []
    register_when_loaded(STEPS)
    assert core().known == ["ours"] and not waiting()


def test_twice(library):
    register_when_loaded(STEPS)
    register_when_loaded(STEPS)
    assert len(waiting()) == 1
    assert core().known == ["ours"]
    register_when_loaded(STEPS)
    assert core().known == ["ours"] and not waiting()


def test_the_extension_first(library):
    """It is half loaded when the library is complete, and must be left to finish."""
    register_when_loaded(STEPS)
    importlib.import_module("extends_it")
    assert core().known == ["ours"] and not waiting()


def test_the_library_is_as_if_imported_without(library):
    register_when_loaded(STEPS)
    module = core()
    assert type(module.__loader__).__name__ == "SourceFileLoader" and module.__spec__.loader is module.__loader__
    assert inspect.getsource(module) == (library / "slow_library" / "core.py").read_text()
    assert importlib.reload(module).known == []  # the same as of any module


def test_two_threads(library):
    (library / "slow_library" / "core.py").write_text(
        "import time\nknown = []\ntime.sleep(0.2)\nloaded = True\n"  # long enough for the other thread to come
    )
    register_when_loaded(STEPS)
    found: list = []
    threads = [threading.Thread(target=lambda: found.append(core().known)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 4 * [["ours"]] and not waiting()


def test_while_another_thread_loads_the_library(library):
    """Registering then waits: the extension needs what comes last in the library."""
    (library / "slow_library" / "core.py").write_text(
        "import threading, time\nimport slow_library\nknown = []\nslow_library.begun.set()\ntime.sleep(0.2)\n"
        "loaded = True\n"
    )
    package = importlib.import_module("slow_library")
    package.begun = threading.Event()
    thread = threading.Thread(target=core)
    thread.start()
    package.begun.wait()
    register_when_loaded(STEPS)
    thread.join()
    assert core().known == ["ours"] and not waiting()


def test_an_error_is_raised_where_the_library_is_imported(library):
    (library / "extends_it.py").write_text("raise RuntimeError('no such thing')\n")
    register_when_loaded(STEPS)
    message = (
        r"could not register .*: extends_it failed to import after slow_library.core was loaded \(RuntimeError: no"
    )
    for _ in range(2):  # every time, not only the first
        with pytest.raises(ImportError, match=message) as error:
            core()
        assert isinstance(error.value.__cause__, RuntimeError)
        assert "slow_library.core" not in sys.modules


def test_an_error_at_once_leaves_the_library_alone(library):
    (library / "extends_it.py").write_text("raise RuntimeError('no such thing')\n")
    core()
    with pytest.raises(ImportError, match="could not register"):
        register_when_loaded(STEPS)
    assert core().known == [] and not waiting()


def test_an_error_of_the_library_is_its_own(library):
    (library / "slow_library" / "core.py").write_text("raise KeyError('theirs')\n")
    register_when_loaded(STEPS)
    with pytest.raises(KeyError, match="theirs"):
        core()
    assert "extends_it" not in sys.modules and len(waiting()) == 1


# The real one ------------------------------------------------------------------------------------------------------

LOADS = """
from transformers import AutoModelForImageClassification
assert same(AutoModelForImageClassification.from_pretrained(directory))
"""
ORDERS = {
    "ours, theirs": "import hf_saq, transformers" + LOADS,
    "theirs, ours": "import transformers; transformers.PreTrainedModel; import hf_saq" + LOADS,
    "quantizers alone": """
import hf_saq
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
config = AutoQuantizationConfig.from_pretrained(directory)
assert type(config) is hf_saq.SAQQuantizationConfig
assert AutoHfQuantizer.from_config(config).quantization_config is config
assert "transformers.modeling_utils" not in sys.modules"""
    + LOADS,
    "our method": "from hf_saq import quantize" + LOADS,
}
"""Each takes seconds, all of them to import transformers."""
MORE_ORDERS = {
    "models of theirs, ours": "import transformers.models.vit.modeling_vit, hf_saq" + LOADS,
    "twice": """
import hf_saq, importlib
importlib.reload(hf_saq)
import transformers.modeling_utils
importlib.reload(hf_saq)"""
    + LOADS,
    "a pipeline": """
import hf_saq
from transformers import pipeline
model = pipeline("image-classification", model=directory, image_processor=directory).model
assert same(model)""",
    "quantizers, ours": """
import transformers.quantizers, hf_saq
assert type(transformers.quantizers.AutoQuantizationConfig.from_pretrained(directory)).__module__.startswith("hf_saq")
assert "transformers.modeling_utils" not in sys.modules"""
    + LOADS,
    "our configuration": """
from hf_saq import SAQConfig
assert "transformers.quantizers" not in sys.modules"""
    + LOADS,
    "our quantizer": "import hf_saq.storage.from_pretrained" + LOADS,
    "our attention": "import hf_saq.conversion.attention_interface" + LOADS,
    "our trainer": "from hf_saq import SAQTrainer" + LOADS,
    "our commands": """
from hf_saq.cli import main
assert main(["inspect", directory]) == 0"""
    + LOADS,
    "integrations of theirs": """
import hf_saq
import transformers.integrations.peft, transformers.core_model_loading, transformers.masking_utils"""
    + LOADS,
    "generation of theirs": "import hf_saq; import transformers.generation.utils" + LOADS,
    "factories of theirs": "import hf_saq; import transformers.models.auto.auto_factory" + LOADS,
}

RUNNER = """
import json, os, sys, traceback
import torch  # once: each order is a fork of this process, in which there is neither transformers nor hf_saq
orders, directory = json.loads(sys.argv[1]), sys.argv[2]

def same(model):
    x, expected = torch.load(os.path.join(directory, "expected.pt"))
    with torch.no_grad():
        return torch.equal(model.eval()(x).logits, expected)

assert not {"transformers", "hf_saq"} & set(sys.modules)
failed = {}
for name, code in orders.items():
    pid = os.fork()
    if pid == 0:
        try:
            exec(code, {"directory": directory, "same": same, "sys": sys})
            assert not [f for f in sys.meta_path if type(f).__module__ == "hf_saq.registration"], "the finder stayed"
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed[name] = os.waitpid(pid, 0)[1] != 0
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A packed model with quantized attention products, so that both registrations are needed, and its logits."""
    from transformers import ViTImageProcessor

    from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize

    directory, x = tmp_path_factory.mktemp("saved"), images()
    model = pack(calibrate(quantize(vit(), SAQQuantizationConfig(quantize_attention=True)), [x]).eval())
    model.save_pretrained(directory)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory)
    with torch.no_grad():
        torch.save((x, model(x).logits), directory / "expected.pt")
    return directory


def check_orders(saved: Path, orders: dict[str, str]) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(orders), str(saved)], capture_output=True, text=True, timeout=HANGS
    )
    assert outcome.returncode == 0, outcome.stderr
    failed = json.loads(outcome.stdout.splitlines()[-1])
    assert failed == dict.fromkeys(orders, False), outcome.stderr


@pytest.mark.slow
def test_a_quantized_model_loads_after_imports_in_any_order(saved):
    check_orders(saved, ORDERS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_quantized_model_loads_after_more_imports(saved):
    check_orders(saved, MORE_ORDERS)
