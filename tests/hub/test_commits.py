"""Pushing and loading back, against a stand-in for the Hub: real `huggingface_hub`, real HTTP on this machine."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_standin import TOKEN, HubStandIn
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import close_session
from PIL import Image
from processes import HANGS, run_python
from safetensors.torch import load as read_tensors
from tiny_models import images, vit
from training import Images, arguments, quantized_model
from transformers import AutoModelForImageClassification, ViTImageProcessor
from transformers.utils import hub as transformers_hub

from hf_saq import SAQConfig, SAQTrainer, pack
from hf_saq.cli import main
from hf_saq.conversion.forms import is_packed
from hf_saq.hub.commits import explained

PUBLISHED = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training_curve.png"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The stand-in, with this process turned towards it as the environment of a new one would."""
    cache = tmp_path_factory.mktemp("cache")
    with HubStandIn() as standin, pytest.MonkeyPatch.context() as patch:
        for name, value in standin.environment(cache).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", standin.url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", standin.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(transformers_hub, "_hf_api", None)
        close_session()
        yield standin
    close_session()


def make_trainer(directory, repository: str, **changes) -> SAQTrainer:
    return SAQTrainer(
        quantized_model("vit", torch.float32),
        arguments(directory / "outputs", **{"push_to_hub": True, "hub_model_id": repository, **changes}),
        saq_config=SAQConfig(rho=0.1, schedule="full"),
        train_dataset=Images(12, torch.float32),
        eval_dataset=Images(4, torch.float32),
        compute_metrics=lambda _: {"top1": 0.625, "top5": 0.875},
        processing_class=ViTImageProcessor(size={"height": 16, "width": 16}),
    )


def every_step(**changes) -> dict:
    """Arguments of a run of three steps that evaluates and saves at each, and pushes all it may."""
    steps = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, hub_always_push=True)
    return {**steps, **changes}


def at_top(files: dict[str, bytes]) -> set[str]:
    return {name for name in files if "/" not in name}


def is_packed_file(content: bytes) -> bool:
    return any(name.endswith("packed_weight") for name in read_tensors(content))


def load(repository: str, **where):
    return AutoModelForImageClassification.from_pretrained(repository, **where).eval()


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory) -> SAQTrainer:
    """A run that pushed after every save, the checkpoint too; its `output_dir` holds what does not belong."""
    directory = tmp_path_factory.mktemp("published")
    trainer = make_trainer(directory, "published", **every_step(hub_strategy="checkpoint", hub_token=TOKEN))
    (directory / "outputs" / "runs").mkdir(parents=True)
    for name in ("runs/events", "optimizer.pt", "model-00001-of-00002.safetensors.bak", "notes.txt"):
        (directory / "outputs" / name).write_text("private")
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


@pytest.mark.slow
def test_an_exported_graph_is_published_and_never_stays_beside_other_weights(hub, tmp_path):
    trainer = make_trainer(tmp_path, "exported")
    trainer.export_onnx(check=False)
    trainer.push_to_hub()
    files = hub.files("me/exported")
    graph = "onnx/model_quantized.onnx"
    assert files[graph] == (tmp_path / "outputs" / graph).read_bytes()
    assert json.loads(files["config.json"])["hf_saq_export"]["file"] == graph
    assert 'ExportedClassifier.from_pretrained("me/exported"' in files["README.md"].decode()
    from hf_saq.export import ExportedClassifier

    hub.requests.clear()
    graph_model, x = ExportedClassifier.from_pretrained("me/exported", revision="main", threads=1), images(3)
    assert not any("model.safetensors" in request for request in hub.requests)  # a graph needs no weights
    with torch.no_grad():
        expected = load("me/exported")(x).logits
    torch.testing.assert_close(graph_model(x).logits, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert not load("me/exported").training  # the packed model loads, with the graph beside it
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("me/exported")
    assert graph not in files and "Integer inference" not in files["README.md"].decode()
    assert "hf_saq_export" not in json.loads(files["config.json"])


def test_what_is_published(hub, published):
    files = hub.files("me/published")
    assert at_top(files) == PUBLISHED
    assert is_packed_file(files["model.safetensors"])
    assert json.loads(files["config.json"])["quantization_config"]["storage"] == "packed"
    folders = {name.split("/")[0] for name in files if "/" in name}
    assert folders == {"last-checkpoint"}
    assert not is_packed_file(files["last-checkpoint/model.safetensors"])  # to resume from
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(files)
    assert not any(TOKEN.encode() in content for content in files.values())
    # The stock Trainer pushes this one, with the token in it.
    assert TOKEN.encode() in (Path(published.args.output_dir) / "training_args.bin").read_bytes()


def test_never_anything_but_packed_weights_at_the_top(hub, published):
    """In no commit of all that training made."""
    commits = hub.repositories["me/published"].commits[1:]
    assert [commit["message"] for commit in commits] == [
        *(f"Training in progress, step {step}{part}" for step in (1, 2, 3) for part in ("", ", checkpoint")),
        "Model save",
    ]
    for commit in commits:
        assert at_top(commit["files"]) <= PUBLISHED
        assert is_packed_file(commit["files"]["model.safetensors"])
        card = yaml.safe_load(commit["files"]["README.md"].decode().split("---\n")[1])
        assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.625
    biases = [read_tensors(commit["files"]["model.safetensors"])["classifier.bias"] for commit in commits]
    assert len({tuple(bias.tolist()) for bias in biases}) == 3  # each push is of its step's weights, not of later ones


def test_load_back(hub, published):
    x = images(seed=3)
    with torch.no_grad():
        expected = pack(published.model)(x).logits
        loaded = load("me/published")
        assert is_packed(loaded)
        assert torch.equal(loaded(x).logits, expected)
        checkpoint = load("me/published", subfolder="last-checkpoint")
        assert not is_packed(checkpoint)
        torch.testing.assert_close(checkpoint(x).logits, expected)
        earlier = hub.repositories["me/published"].commits[1]["sha"]
        assert not torch.equal(load("me/published", revision=earlier)(x).logits, expected)


SECOND_PROCESS = """
import json, re, sys
from pathlib import Path
repository, card, x = sys.argv[1:]
import hf_saq
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(repository)
with torch.no_grad():
    torch.save(model(torch.load(x)).logits, "logits.pt")
snippet = re.search(r"```python\\n(.*?)```", Path(card).read_text(), flags=re.DOTALL)[1]
namespace = {}
exec(snippet, namespace)
print(json.dumps(namespace["classify"]("image.png")))
"""


def test_a_second_process_loads_it_and_runs_the_snippet_of_the_card(hub, published, tmp_path):
    x = images(seed=4)
    torch.save(x, tmp_path / "x.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (tmp_path / "README.md").write_bytes(hub.files("me/published")["README.md"])
    arguments = ("-c", SECOND_PROCESS, "me/published", "README.md", "x.pt")
    outcome = run_python(*arguments, cwd=tmp_path, **hub.environment(tmp_path / "cache"))
    packed = pack(published.model)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), packed(x).logits)
        inputs = published.processing_class(Image.open(tmp_path / "image.png"), return_tensors="pt")
        probabilities = packed(**inputs).logits.softmax(-1)[0]
    printed = {entry["label"]: entry["score"] for entry in json.loads(re.findall(r"\[.*\]", outcome.stdout)[-1])}
    assert printed == pytest.approx({f"LABEL_{i}": p.item() for i, p in enumerate(probabilities)}, abs=1e-6)


def test_strategy_end_and_every_save(hub, tmp_path):
    make_trainer(tmp_path, "end", **every_step(hub_strategy="end", max_steps=2)).train()
    assert hub.messages("me/end") == ["initial commit"]
    every = make_trainer(tmp_path, "every", **every_step(hub_strategy="every_save", max_steps=2))
    every.train()
    assert hub.messages("me/every")[1:] == [f"Training in progress, step {step}" for step in (1, 2)]
    assert set(hub.files("me/every")) == PUBLISHED
    # While training only the repository gets the packed model.
    assert not (tmp_path / "outputs" / "model.safetensors").exists()


def test_strategy_all_checkpoints(hub, tmp_path):
    make_trainer(tmp_path, "all", **every_step(hub_strategy="all_checkpoints", max_steps=2)).train()
    files = hub.files("me/all")
    assert {name.split("/")[0] for name in files if "/" in name} == {"checkpoint-1", "checkpoint-2"}
    assert at_top(files) == PUBLISHED and is_packed_file(files["model.safetensors"])


def test_a_push_replaces_all_weights_that_were_there(hub, tmp_path):
    """A float checkpoint of one file, and one in shards, from before; those in folders stay."""
    trainer = make_trainer(tmp_path, "replaced")
    before = hub.repositories["me/replaced"].branches["main"]["files"]
    old = ("pytorch_model.bin", "model.safetensors.index.json", "model-00001-of-00001.safetensors")
    before.update({name: b"old" for name in (*old, "model.safetensors", "onnx/model.safetensors", "notes.md")})
    trainer.push_to_hub()
    files = hub.files("me/replaced")
    assert set(files) == (PUBLISHED - {"training_curve.png"}) | {"onnx/model.safetensors", "notes.md"}
    assert is_packed_file(files["model.safetensors"])


def test_private_and_revision(hub, tmp_path):
    trainer = make_trainer(tmp_path, "me/hidden", push_to_hub=False)
    commit = trainer.push_to_hub(private=True, revision="v1", commit_message="First")
    assert hub.repositories["me/hidden"].private and hub.files("me/hidden") == {}
    assert commit.oid == hub.repositories["me/hidden"].branches["v1"]["sha"]
    assert '"me/hidden", revision="v1"' in hub.files("me/hidden", "v1")["README.md"].decode()
    assert is_packed(load("me/hidden", revision="v1"))
    with pytest.raises(ValueError, match="Unrecognized model in me/hidden"):  # its main branch is empty
        load("me/hidden")
    with pytest.raises(OSError, match="me/hidden"):
        load("me/hidden", revision="v1", token=False, cache_dir=tmp_path / "empty")


def test_a_push_that_is_cut_off_and_repeated(hub, tmp_path):
    trainer = make_trainer(tmp_path, "cut")
    trainer.push_to_hub(commit_message="One")
    before = dict(hub.files("me/cut"))
    trainer.model.classifier.bias.data += 1
    hub.cut_off.add("me/cut")
    with pytest.raises(ConnectionError, match="broke while pushing to 'me/cut'.*call `push_to_hub` again"):
        trainer.push_to_hub(commit_message="Two")
    assert hub.files("me/cut") == before and not hub.cut_off
    x = images()
    with torch.no_grad():
        assert not torch.equal(load("me/cut")(x).logits, pack(trainer.model)(x).logits)
        trainer.push_to_hub(commit_message="Two again")
        assert torch.equal(load("me/cut")(x).logits, pack(trainer.model)(x).logits)
    assert hub.messages("me/cut") == ["initial commit", "One", "Two again"]


def test_a_push_in_the_background_that_fails_is_logged(hub, tmp_path, caplog):
    trainer = make_trainer(tmp_path, "background")
    hub.cut_off.add("me/background")
    future = trainer.push_to_hub(blocking=False)
    assert isinstance(future.exception(timeout=HANGS), ConnectionError)
    deadline = time.monotonic() + HANGS
    while not caplog.text and time.monotonic() < deadline:  # the log line follows the result
        time.sleep(0.05)
    assert "to me/background failed" in caplog.text
    trainer.model.classifier.bias.data += 1
    future = trainer.push_to_hub(blocking=False)
    packed = pack(trainer.model)
    trainer.model.classifier.bias.data += 1
    trainer.save_model(_internal_call=True)  # into the very directory, while the upload may still be running
    future.result(timeout=HANGS)
    with torch.no_grad():
        assert torch.equal(load("me/background")(images()).logits, packed(images()).logits)


def test_wrong_token(hub, tmp_path):
    with pytest.raises(HfHubHTTPError, match="refused creating the repository 'nobody'. It needs a token with write"):
        make_trainer(tmp_path, "nobody", hub_token="hf_wrong")
    assert "me/nobody" not in hub.repositories
    trainer = make_trainer(tmp_path, "somebody")
    with pytest.raises(HfHubHTTPError, match=r"401.*(\n.*)*refused pushing to 'me/somebody'"):
        trainer.push_to_hub(token="hf_wrong")
    assert hub.files("me/somebody") == {}


def test_other_errors_of_the_hub_are_left_alone(hub):
    from huggingface_hub import HfApi

    with pytest.raises(HfHubHTTPError) as error, explained("looking"):
        HfApi().list_repo_files("me/not-there")
    assert "looking" not in str(error.value)


def test_push_to_hub_of_a_packed_model(hub):
    packed = pack(quantized_model("vit", torch.float32))
    packed.push_to_hub("by-itself")
    files = hub.files("me/by-itself")
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert card == {"library_name": "transformers", "tags": ["quantized", "saq", "w4a4", "lsq"]}
    loaded = load("me/by-itself")
    with torch.no_grad():
        assert torch.equal(loaded(images()).logits, packed(images()).logits)
    loaded.push_to_hub("by-itself-again")
    again, first = (read_tensors(hub.files(f"me/{n}")["model.safetensors"]) for n in ("by-itself-again", "by-itself"))
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_a_float_model_is_pushed_as_by_trainer(hub, tmp_path):
    trainer = SAQTrainer(
        vit(),
        arguments(tmp_path / "outputs", push_to_hub=True, hub_model_id="float"),
        saq_config=SAQConfig(case=None),
    )
    trainer.save_model()
    files = hub.files("me/float")
    assert not is_packed_file(files["model.safetensors"]) and "training_args.bin" in files


def test_inspect_a_repository(hub, published, capsys, tmp_path, monkeypatch):
    """Nothing else of it is downloaded, and not the checkpoint in its folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["inspect", "me/published", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weight_bytes"] == len(hub.files("me/published")["model.safetensors"])
    (snapshot,) = tmp_path.glob("*/snapshots/*")
    downloaded = {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()}
    assert downloaded == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert main(["inspect", "me/not-there"]) == 1
    assert "not-there" in capsys.readouterr().err
