"""The sign and "calibrated" are what the stored state says, whoever wrote it, and are read anew only for a reason."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from tiny_models import linear_net, vectors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.quantizers import LSQQuantizer, Quantizer, QuantizerSettings


class Reads(TorchDispatchMode):
    """Counts how often a value is fetched from a tensor, which waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002 (torch's signature)
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(run: Callable[[], object]) -> int:
    with Reads() as mode:
        run()
    return mode.count


def auto_quantizer(signed: bool = False) -> LSQQuantizer:
    quantizer = LSQQuantizer(QuantizerSettings(4, "activation", signed=None))
    quantizer.initialize(torch.tensor([-1.0 if signed else 0.0, 2.0]))
    return quantizer


def calibrated_net() -> nn.Sequential:
    net = linear_net().eval()
    quantize(net, SAQQuantizationConfig())
    return calibrate(net, [vectors(16)])


def quantizers(model: nn.Module) -> list[Quantizer]:
    return [module for module in model.modules() if isinstance(module, Quantizer)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_a_write_to_the_buffer_is_obeyed(mode):
    quantizer = auto_quantizer()
    x = torch.tensor([-1.5, 1.0])
    assert not quantizer.signed and quantizer(x)[0] == 0
    with mode():
        quantizer.range_state.fill_(1)
    assert quantizer.signed and (quantizer.qmin, quantizer.qmax) == (-8, 7) and quantizer(x)[0] < 0
    quantizer.range_state = torch.tensor(0, dtype=torch.int8)  # another tensor
    assert not quantizer.signed and quantizer(x)[0] == 0
    with mode():
        quantizer.range_state.copy_(torch.tensor(-1))
    assert not quantizer.initialized
    with pytest.raises(RuntimeError, match="no range yet"):
        quantizer(x)


def test_a_range_that_arrives_behind_the_back_of_versions_is_found():
    """Some averages write through `.data`, which no version shows."""
    quantizer = LSQQuantizer(QuantizerSettings(4, "activation", signed=None))
    assert not quantizer.initialized
    quantizer.scale.data.fill_(0.1)
    quantizer.range_state.data.copy_(torch.tensor(1))
    assert quantizer.initialized and quantizer.signed


def test_the_sign_cannot_be_set_beside_the_state():
    quantizer = auto_quantizer()
    for name in ("signed", "initialized", "bits", "scale_shape"):
        with pytest.raises(AttributeError):
            setattr(quantizer, name, True)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("state", [-1, 0, 1])
def test_loading_brings_the_state(assign: bool, state: int):
    quantizer = auto_quantizer(signed=True)
    stored = {**quantizer.state_dict(), "range_state": torch.tensor(state, dtype=torch.int8)}
    quantizer.load_state_dict(stored, assign=assign)
    assert quantizer.initialized is (state >= 0)
    assert quantizer.signed is (state == 1)


@pytest.mark.parametrize("damaged", [7, 0.5])
def test_a_damaged_state_is_named_wherever_it_came_from(damaged: float):
    quantizer = auto_quantizer()
    quantizer.path = "head.activation_quantizer"
    message = rf"head\.activation_quantizer\.range_state is {damaged}; expected 35 .*50 .*or 100"
    state = {**quantizer.state_dict(), "range_state": torch.tensor(damaged)}
    with pytest.raises(ValueError, match=message):
        quantizer.load_state_dict(state, assign=True)
    quantizer.range_state = torch.tensor(damaged)
    with pytest.raises(ValueError, match=message):  # and again, as long as nobody mends it
        quantizer(torch.ones(2))


def test_a_forward_fetches_no_value():
    net = calibrated_net()
    x = vectors(4)
    net(x)
    assert reads(lambda: net(x)) == 0
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    assert reads(lambda: net(x)) == 0  # loading has read them
    with torch.no_grad():
        quantizers(net)[0].range_state.fill_(1)
    assert reads(lambda: net(x)) == 1
    assert reads(lambda: net(x)) == 0


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("calibrated_before", [False, True])
def test_an_average_in_memory_has_the_state_of_its_model(use_buffers: bool, calibrated_before: bool):
    net = linear_net().eval()
    quantize(net, SAQQuantizationConfig())
    if calibrated_before:
        calibrate(net, [vectors(16)])
    average = AveragedModel(net, use_buffers=use_buffers)
    calibrate(net, [vectors(16)])
    average.update_parameters(net)  # the first update copies
    x = vectors(4)
    assert torch.equal(average(x), net(x))
    assert reads(lambda: average(x)) == 0


def pickled(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_reads_its_own_buffer(copied):
    quantizer = auto_quantizer()
    assert copied(quantizer).initialized and not copied(quantizer).signed
    for _ in range(10):
        quantizer.range_state.fill_(0)
    assert not quantizer.signed
    for writes in range(1, 13):  # whatever versions the copy of the buffer goes through
        twin = copied(quantizer)
        for _ in range(writes):
            twin.range_state.fill_(1)
        assert twin.signed and not quantizer.signed
    with torch.no_grad():
        quantizer.range_state.fill_(1)
        twin.range_state.fill_(0)
    assert quantizer.signed and not twin.signed


def test_functional_calls_use_the_state_they_are_given():
    net = calibrated_net()
    x = vectors(4)
    expected = net(x)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert torch.equal(torch.func.functional_call(net, state, (x,)), expected)
    name = next(name for name in state if name.endswith("0.activation_quantizer.range_state"))
    other = state | {name: 150 - state[name]}
    assert not torch.equal(torch.func.functional_call(net, other, (x,)), expected)
    assert torch.equal(net(x), expected)


def test_tensors_without_a_version_or_a_value():
    net = calibrated_net()
    x = vectors(4)
    expected = net(x)
    with torch.inference_mode():
        made_here = copy.deepcopy(net)
        assert quantizers(made_here)[0].range_state.is_inference()
        assert torch.equal(made_here(x), expected)
        quantizers(made_here)[0].range_state.fill_(-1)
        with pytest.raises(RuntimeError, match="no range yet"):
            made_here(x)
    assert copy.deepcopy(net).to("meta")(x.to("meta")).shape == expected.shape
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        quantizer = quantizers(net)[0]
        faked = torch.func.functional_call(
            quantizer,
            {name: mode.from_tensor(t) for name, t in quantizer.state_dict().items()},
            (mode.from_tensor(x),),
        )
    assert faked.shape == x.shape


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def test_compiled_models_have_the_stored_sign():
    net = calibrated_net()
    x = vectors(4)
    fast = compiled(net)
    torch.testing.assert_close(fast(x), net(x))
    before = net(x)
    changed = quantizers(net)[0]
    changed.take_state(not changed.signed)
    assert not torch.equal(net(x), before)
    torch.testing.assert_close(fast(x), net(x))  # made anew


def test_a_model_that_was_only_written_to_compiles():
    """Nothing has read the state of this average when the compiler comes to it."""
    net = linear_net().eval()
    quantize(net, SAQQuantizationConfig())
    average = AveragedModel(net)
    calibrate(net, [vectors(16)])
    average.update_parameters(net)
    torch.testing.assert_close(compiled(average)(vectors(4)), net(vectors(4)))


def _wrap(rank: int, folder: str) -> None:
    """Be one of two processes, calibrated on data of its own before it knows of the other; DDP makes them alike."""
    net = linear_net().eval()
    quantize(net, SAQQuantizationConfig())
    calibrate(net, [vectors(16).abs() if rank else vectors(16)])
    quantizer = net[0].activation_quantizer
    own = quantizer.signed
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    wrapped = nn.parallel.DistributedDataParallel(net)
    torch.save((own, quantizer.signed, wrapped(vectors(4)).detach()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_wrapped_by_ddp_have_the_state_of_the_first(tmp_path):
    torch.multiprocessing.spawn(_wrap, (str(tmp_path),), nprocs=2)
    (own_0, sign_0, y_0), (own_1, sign_1, y_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert own_0 and not own_1  # what each saw
    assert sign_0 and sign_1
    assert torch.equal(y_0, y_1)
