"""Models with quantized attention products: saved, loaded, resumed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from architectures import logits_of
from attention_models import W4A4, all_products, batch_of, build, quantized_vit
from checkpoint_files import load
from processes import run_python
from quantized_models import assert_same_state
from tiny_models import convnext, images, jitter, linear_net, vit
from training import Images, arguments

from hf_saq import SAQConfig, SAQTrainer, calibrate, pack, quantize
from hf_saq.conversion.calibration import NEVER_RUN
from hf_saq.conversion.forms import is_packed


@pytest.mark.parametrize(
    ("name", "storage"), [("vit", "float"), ("beit", "float"), ("swin", "packed"), ("dinov2", "packed")]
)
def test_saved_and_loaded(name: str, storage: str, tmp_path: Path):
    model = build(name)
    batch = batch_of(model, name)
    jitter(calibrate(quantize(model, W4A4), [batch])).eval()
    saved = pack(model) if storage == "packed" else model
    assert torch.equal(logits_of(saved(**batch)), logits_of(model(**batch)))
    saved.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    model_class = type(model)
    loaded = model_class.from_pretrained(tmp_path)
    assert_same_state(loaded, saved)
    for tensor in [*loaded.parameters(), *loaded.buffers()]:
        tensor.data = tensor.data.clone()  # see `load`
    assert loaded.config._attn_implementation == "saq" and loaded.config.quantization_config.quantize_attention
    assert len(all_products(loaded)) == len(all_products(model)) and is_packed(loaded) == (storage == "packed")
    assert torch.equal(logits_of(loaded(**batch)), logits_of(model(**batch)))
    if storage == "float":
        assert "signed, probabilities unsigned" in str(loaded.quantization_report)


def test_loaded_in_a_fresh_process(tmp_path: Path):
    model = pack(quantized_vit())
    model.save_pretrained(tmp_path / "model")
    torch.save((images(), model(images()).logits), tmp_path / "expected.pt")
    code = (
        "import sys, torch, hf_saq\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1] + '/model')\n"
        "for t in [*model.parameters(), *model.buffers()]: t.data = t.data.clone()\n"
        "x, y = torch.load(sys.argv[1] + '/expected.pt')\n"
        "print(model.config._attn_implementation, torch.equal(model(x).logits, y))\n"
    )
    assert run_python("-c", code, tmp_path).stdout == "saq True\n"


def test_a_float_checkpoint_becomes_what_quantize_makes_of_it(tmp_path: Path):
    vit().save_pretrained(tmp_path)
    loaded, info = load(tmp_path, quantization_config=W4A4, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = quantize(vit(), W4A4)
    assert_same_state(loaded, expected)
    for model in (loaded, expected):
        calibrate(model, [images()])
    assert torch.equal(loaded(images()).logits, expected(images()).logits)


@pytest.mark.parametrize("stored", ["float model", "quantized model"])
def test_another_implementation_is_replaced_with_a_warning(stored: str, tmp_path: Path):
    (vit() if stored == "float model" else quantized_vit()).save_pretrained(tmp_path)
    config = {"quantization_config": W4A4} if stored == "float model" else {}
    for asked in ("sdpa", {"": "flex_attention"}):
        with pytest.warns(
            UserWarning, match="^attn_implementation='(sdpa|flex_attention)' is replaced by 'saq': with"
        ):
            model = load(tmp_path, attn_implementation=asked, **config)
        assert model.config._attn_implementation == "saq" and len(all_products(model)) == 2
    for asked in ("eager", "saq"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(tmp_path, attn_implementation=asked, **config).config._attn_implementation == "saq"


def test_resume_with_an_attention_that_is_never_called(tmp_path: Path):
    """Its products go back to float, and the checkpoint of such a model resumes with the same ones."""

    def trainer(max_steps: int) -> SAQTrainer:
        model = vit()
        attention = model.vit.layers[1].attention
        attention.forward = lambda hidden_states, *args, **kwargs: (attention.o_proj(hidden_states), None)
        args = arguments(tmp_path, max_steps=max_steps, save_steps=1, save_strategy="steps")
        data = Images(16, torch.float32)
        return SAQTrainer(
            model, args, saq_config=SAQConfig(rho=0.1, schedule="full"), quantization_config=W4A4, train_dataset=data
        )

    first = trainer(1)
    with pytest.warns(UserWarning, match="^calibrate: 4 of 16 layers stay in float, because the model never calls"):
        first.train()
    second = trainer(2)
    second.train(resume_from_checkpoint=True)
    for model in (first.model, second.model):
        idle = {layer.name for layer in model.quantization_report.skipped if layer.reason == NEVER_RUN}
        assert idle == {f"vit.layers.1.attention.{name}" for name in ("products", "q_proj", "k_proj", "v_proj")}
        assert idle == set(model.config.quantization_config.modules_to_not_convert)
        assert not all_products(model)["vit.layers.1.attention.products"].own_quantizers()
    loaded = load(tmp_path / "checkpoint-2")
    assert loaded.state_dict().keys() == second.model.state_dict().keys()
    assert list(all_products(loaded)) == ["vit.layers.0.attention.products"]


def test_loading_a_model_without_the_interface_is_refused(tmp_path: Path):
    convnext().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^ConvNextForImageClassification: quantize_attention=True, but no attention"):
        load(tmp_path, quantization_config=W4A4)
    with pytest.raises(ValueError, match="^Sequential: quantize_attention=True, but no attention of this model"):
        quantize(linear_net(), W4A4)
