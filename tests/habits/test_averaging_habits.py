"""Users average models: EMA, SWA, model soups. Calibrated states survive it, or it fails with a clear error."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from minimizer_nets import batch, linear_net
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.quantizers import Quantizer, QuantizerSettings, quantizer_class

DECAYS = [0.5, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9998, 0.9999, 0.99996]
STATES = {"not calibrated": None, "unsigned": False, "signed": True}


def float_net() -> nn.Module:
    return quantize(linear_net(), SAQQuantizationConfig()).eval()


def data() -> Tensor:
    return batch(linear_net())[0]


def calibrated_net() -> nn.Module:
    return calibrate(float_net(), [data()])


def quantizer_in(state: str) -> Quantizer:
    quantizer = quantizer_class("lsq")(QuantizerSettings(4, "activation", signed=None))
    quantizer.path = "layer.activation_quantizer"
    if STATES[state] is not None:
        quantizer.take_state(bool(STATES[state]))
    return quantizer


def is_refused(quantizer: Quantizer) -> bool:
    """Whether a forward stops with an error that speaks of averages."""
    try:
        quantizer(torch.ones(3))
    except (ValueError, RuntimeError) as error:
        return "average" in str(error)
    return False


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", [None, 0.9, 0.999], ids=["swa", "ema 0.9", "ema 0.999"])
def test_an_average_of_a_calibrated_model_is_that_model(use_buffers: bool, average: float | None):
    """A user averages a calibrated model that does not change: the average computes what the model does."""
    model = calibrated_net()
    function = None if average is None else get_ema_multi_avg_fn(average)
    averaged = AveragedModel(model, multi_avg_fn=function, use_buffers=use_buffers)
    for _ in range(20):
        averaged.update_parameters(model)
    assert torch.equal(averaged(data()), model(data()))


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_an_average_of_buffers_begun_before_calibration_is_refused(decay: float):
    """A user lets an EMA with buffers begin with the model that is not calibrated: it never passes for calibrated."""
    model = float_net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averaged.update_parameters(model)
    calibrate(model, [data()])
    for _ in range(200):
        averaged.update_parameters(model)
        for module in averaged.modules():
            assert not isinstance(module, Quantizer) or module.role == "weight" or is_refused(module)


def test_an_average_made_before_calibration_follows_the_buffers_of_its_model():
    """A user makes an `AveragedModel` first and calibrates later: the first update copies all there is."""
    model = float_net()
    averaged = AveragedModel(model)
    with pytest.raises(RuntimeError, match="no range yet.*average"):
        averaged(data())
    calibrate(model, [data()])
    averaged.update_parameters(model)
    assert torch.equal(averaged(data()), model(data()))


@pytest.mark.parametrize("begin", STATES)
@pytest.mark.parametrize("decay", DECAYS)
def test_a_running_average_that_is_cut_off_at_each_step_never_becomes_calibrated(begin: str, decay: float):
    """A user's own EMA runs over the whole state dict and writes into int8: equal states stay, "not calibrated" does
    not turn into one of the others. (On the way to "signed" it may meet "unsigned" for a single step, no longer.)"""
    for end in STATES:
        ema, live = quantizer_in(begin), quantizer_in(end)
        passed = 0
        for _ in range(300):
            for mean, value in zip(ema.state_dict().values(), live.state_dict().values(), strict=True):
                mean.copy_(decay * mean + (1 - decay) * value)
            if begin == end and begin != "not calibrated":
                assert ema.initialized and ema.signed == live.signed
            elif begin == "not calibrated":
                passed += not is_refused(ema)
        assert passed <= 1 and (begin != "not calibrated" or is_refused(ema))


SOUPS = [states for n in (2, 3, 4) for states in itertools.combinations_with_replacement(STATES, n)]


@pytest.mark.parametrize("states", SOUPS, ids=[", ".join(states) for states in SOUPS])
@pytest.mark.parametrize("cut", [True, False], ids=["int8", "float"])
def test_a_soup_of_different_states_is_refused(states: tuple[str, ...], cut: bool):
    """A user loads the mean of several state dicts: where they disagree, this is an error."""
    mean = sum(quantizer_in(state).range_state.float() for state in states) / len(states)
    target = quantizer_in("signed")
    arriving = {**target.state_dict(), "range_state": mean.to(torch.int8) if cut else mean}
    alike = len(set(states)) == 1
    if alike:
        target.load_state_dict(arriving)
        assert target.initialized == (states[0] != "not calibrated")
        return
    try:
        target.load_state_dict(arriving)
    except ValueError as error:
        assert "layer.activation_quantizer.range_state" in str(error) and "copy their buffers" in str(error)
    else:
        assert not target.initialized and is_refused(target)


def test_a_mean_of_states_in_float_is_not_cut_off():
    """A mean just above a valid code is refused when it is loaded in float, where int8 would hide it."""
    target = quantizer_in("signed")
    with pytest.raises(ValueError, match=r"range_state is 50\.5; .*average of state dicts"):
        target.load_state_dict({**target.state_dict(), "range_state": torch.tensor(50.5)})


@pytest.mark.parametrize(("former", "state"), [(-1, "not calibrated"), (0, "unsigned"), (1, "signed")])
def test_codes_of_older_checkpoints_load_and_are_brought_up_to_date(former: int, state: str):
    """A user loads a checkpoint of the first format and averages from there on: no old code stays in memory."""
    loaded = quantizer_in("unsigned" if state == "signed" else "signed")
    loaded.load_state_dict({**loaded.state_dict(), "range_state": torch.tensor(former, dtype=torch.int8)})
    assert torch.equal(loaded.range_state, quantizer_in(state).range_state)
    assert loaded.initialized == (state != "not calibrated") and (former == -1 or loaded.signed == (former == 1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: _loaded(model)], ids=["deepcopy", "state dict"])
def test_copies_know_that_they_are_calibrated(copied: Callable[[nn.Module], nn.Module]):
    """A user copies a calibrated model, as a whole or through its state dict: the copy runs."""
    model = calibrated_net()
    assert torch.equal(copied(model)(data()), model(data()))


def _loaded(model: nn.Module) -> nn.Module:
    fresh = float_net()
    fresh.load_state_dict(model.state_dict())
    return fresh
