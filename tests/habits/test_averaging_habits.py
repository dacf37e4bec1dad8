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
        quantizer.initialize(torch.tensor([-1.0 if STATES[state] else 0.0, 1.0]))
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


def own_ema(model: nn.Module, decay: float, buffers: bool) -> tuple[nn.Module, Callable[[], None]]:
    """What many training scripts have: a copy that follows, with buffers copied or averaged too."""
    ema = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for mean, value in zip(ema.parameters(), model.parameters(), strict=True):
            mean.mul_(decay).add_(value, alpha=1 - decay)
        for mean, value in zip(ema.buffers(), model.buffers(), strict=True):
            mean.copy_(decay * mean + (1 - decay) * value if buffers else value)

    return ema, update


def torch_ema(model: nn.Module, decay: float, buffers: bool) -> tuple[nn.Module, Callable[[], None]]:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=buffers)
    averaged.update_parameters(model)  # the first update copies
    return averaged, lambda: averaged.update_parameters(model)


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("buffers", [True, False], ids=["buffers averaged", "buffers copied"])
@pytest.mark.parametrize("begin", [own_ema, torch_ema], ids=["own", "torch"])
def test_an_average_begun_before_calibration_is_refused(begin, buffers: bool, decay: float):
    """A user lets an EMA begin with the model that is not calibrated. Also where the state comes as a copy, the
    values from before weigh in it, for as long as one likes."""
    model = float_net()
    averaged, update = begin(model, decay, buffers)
    calibrate(model, [data()])
    for _ in range(100):
        update()
        assert all(is_refused(m) for m in averaged.modules() if isinstance(m, Quantizer) and m.role == "activation")
    if not buffers:
        with pytest.raises(
            ValueError, match=r"0.activation_quantizer.scale: NaN .* begun before calibration.*: begin"
        ):
            averaged(data())


def test_an_average_of_values_alone_that_is_loaded_is_refused():
    """A user averages the parameters in state dicts, the first from before calibration, and loads the mean with the
    state of the last model."""
    model = float_net()
    before = copy.deepcopy(model.state_dict())
    after = calibrate(model, [data()]).state_dict()
    names = {name for name, _ in model.named_parameters()}
    mean = {name: (before[name] + value) / 2 if name in names else value for name, value in after.items()}
    with pytest.raises(ValueError, match=r"^0.activation_quantizer.scale: NaN .* begun before calibration"):
        model.load_state_dict(mean)


def test_an_uncalibrated_checkpoint_from_before_values_were_nan():
    """A user goes on from an older file: its placeholders of one become NaN as well."""
    model = float_net()
    old = {name: value.nan_to_num(nan=1.0) for name, value in model.state_dict().items()}
    model.load_state_dict(old)
    assert model[0].activation_quantizer.scale.isnan().all()
    assert old["0.activation_quantizer.scale"] == 1


def test_what_goes_over_all_parameters_leaves_an_uncalibrated_model_alone():
    """Users clip gradients and step with decay while one part of the model is not calibrated yet: nothing spreads."""
    part, other = calibrated_net(), float_net()
    both = nn.ModuleList([part, other])
    optimizer = torch.optim.AdamW(both.parameters(), lr=0.1, weight_decay=0.1)
    part(data()).sum().backward()
    assert nn.utils.clip_grad_norm_(both.parameters(), 1.0).isfinite()
    optimizer.step()
    assert all(p.isfinite().all() for p in part.parameters())
    calibrate(other, [data()])
    other(data()).sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in both.parameters())


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
def test_a_running_average_of_whole_state_dicts(begin: str, decay: float):
    """A user's own EMA runs over the whole state dict: equal states stay, "not calibrated" does not turn into one of
    the others, and neither does one sign into the other before the old one has all but vanished from the mean."""
    for end in STATES:
        ema, live = quantizer_in(begin), quantizer_in(end)
        for step in range(1, 301):
            for mean, value in zip(ema.state_dict().values(), live.state_dict().values(), strict=True):
                mean.copy_(decay * mean + (1 - decay) * value)
            if begin == end != "not calibrated":
                assert ema.initialized and ema.signed == live.signed
            else:
                assert is_refused(ema) or ("not calibrated" not in (begin, end) and decay**step < 1e-4)


SOUPS = [
    *(states for n in (2, 3, 4) for states in itertools.combinations_with_replacement(STATES, n)),
    ("unsigned",) * 51 + ("signed",),  # cut off to an integer, this mean would be "unsigned"
    ("not calibrated",) * 10 + ("signed",) * 3,  # (10 * 35 + 3 * 100) / 13 = 50, that is "unsigned"
    ("unsigned",) * 999 + ("not calibrated",),
    ("signed",) * 999 + ("unsigned",),
]


@pytest.mark.parametrize("states", SOUPS, ids=lambda states: f"{len(states)} {states[0]} to {states[-1]}")
def test_a_soup_of_different_states_is_refused(states: tuple[str, ...]):
    """A user loads the mean of several state dicts: where they disagree, this is an error."""
    each = {state: quantizer_in(state).state_dict() for state in set(states)}
    target = quantizer_in("signed")
    arriving = {name: sum(each[state][name] for state in states) / len(states) for name in target.state_dict()}
    if len(each) == 1:
        target.load_state_dict(arriving)
        assert target.initialized == (states[0] != "not calibrated")
        return
    try:
        target.load_state_dict(arriving)
    except ValueError as error:
        assert str(error).startswith("layer.activation_quantizer.") and "average" in str(error)
    else:
        assert not target.initialized and is_refused(target)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_of_another_type_becomes_float32(dtype: torch.dtype, assign: bool):
    """A user loads an older checkpoint, or one that was narrowed: its averages are not cut off either."""
    target = quantizer_in("signed")
    state = {**quantizer_in("unsigned").state_dict(), "range_state": torch.tensor(50, dtype=dtype)}
    target.load_state_dict(state, assign=assign)
    assert target.range_state.dtype == torch.float32 and target.initialized and not target.signed


def test_a_mean_close_to_a_state_is_none():
    with pytest.raises(ValueError, match=r"range_state is 50\.5; .*average of state dicts"):
        target = quantizer_in("signed")
        target.load_state_dict({**target.state_dict(), "range_state": torch.tensor(50.5)})


@pytest.mark.parametrize(("former", "state"), [(-1, "not calibrated"), (0, "unsigned"), (1, "signed")])
def test_codes_of_older_checkpoints_load_and_are_brought_up_to_date(former: int, state: str):
    """A user loads a checkpoint of the first format and averages from there on: no old code stays in memory."""
    loaded = quantizer_in("unsigned" if state == "signed" else "signed")
    loaded.load_state_dict({**loaded.state_dict(), "range_state": torch.tensor(former, dtype=torch.int8)})
    assert loaded.range_state.dtype == torch.float32
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


@pytest.mark.parametrize("order", [1, -1], ids=["state first", "values first"])
def test_a_quantizer_that_is_loaded_tensor_by_tensor_is_complete(order: int):
    """A user loads a state dict in parts: what came first is neither refused nor forgotten."""
    source, target = quantizer_in("signed"), quantizer_in("not calibrated")
    for name, tensor in list(source.state_dict().items())[::order]:
        target.load_state_dict({name: tensor}, strict=False)
    assert torch.equal(target(torch.ones(3)), source(torch.ones(3)))
