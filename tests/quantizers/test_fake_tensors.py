"""Derivatives among fake tensors, as tools compute them that estimate memory, and what is left behind afterwards."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hf_saq.quantizers.kernels import eager, formulas
from hf_saq.quantizers.methods.lsq import lsq_fake_quantize


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Begin and end as a new process does: both functions keep what they have computed."""
    kept = eager.just_outside, formulas._bound_tensors
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def second_derivative(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    (gradient,) = torch.autograd.grad(lsq_fake_quantize(x, scale, -8, 7).square().sum(), scale, create_graph=True)
    return torch.autograd.grad(gradient.sum(), [x, scale])


def test_a_backward_among_fake_tensors_needs_no_earlier_one():
    with FakeTensorMode():
        x, scale = torch.randn(5, requires_grad=True), torch.ones(1, requires_grad=True)
        lsq_fake_quantize(x, scale, -8, 7).sum().backward()
        assert isinstance(scale.grad, FakeTensor)
        assert (x.grad.shape, scale.grad.shape) == ((5,), (1,))


def test_fake_tensors_leave_nothing_behind_for_real_ones():
    x, scale = torch.linspace(-12, 12, 31, requires_grad=True), torch.ones(1, requires_grad=True)
    expected = second_derivative(x, scale)
    formulas._bound_tensors.cache_clear()
    with FakeTensorMode() as mode:
        second_derivative(*(mode.from_tensor(t) for t in (x, scale)))
    for found, one in zip(second_derivative(x, scale), expected, strict=True):
        assert not isinstance(found, FakeTensor)
        torch.testing.assert_close(found, one, rtol=0, atol=0)


def test_bounds_are_the_neighbours_of_the_outermost_codes():
    for dtype in (torch.float32, torch.float64):
        low, high = eager.just_outside(formulas.Grid(-8, 7), dtype)
        ends = torch.tensor([-8.0, 7.0], dtype=dtype)
        assert low == torch.nextafter(ends[0], ends[0] - 1).item()
        assert high == torch.nextafter(ends[1], ends[1] + 1).item()
    low, high = eager.just_outside(formulas.Grid(0, 15), torch.float32)
    assert low < 0 and torch.tensor(low, dtype=torch.float32) == low
