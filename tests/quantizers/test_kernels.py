"""Eager and compiled fake quantization against the formula: same values and gradients, whatever the layout."""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InvalidCxxCompiler
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_saq.quantizers import QUANTIZERS, QuantizerSettings, affine_fake_quantize, quantizer_class, set_backend
from hf_saq.quantizers.kernels import Grid, blocks, compiled, quantize_backward, quantize_forward
from hf_saq.quantizers.kernels import backend as choice
from hf_saq.quantizers.kernels import eager as eager_backend
from hf_saq.quantizers.kernels.formulas import gradient_terms

GRIDS = {
    "signed-2bit": Grid(-2, 1),
    "unsigned-2bit": Grid(0, 3),
    "signed-4bit": Grid(-8, 7),
    "unsigned-4bit": Grid(0, 15),
    "signed-8bit": Grid(-128, 127),
    "unsigned-8bit": Grid(0, 255),
    "pact-4bit": Grid(0, 15, through_rounding=False),
}
SCALES = {"tensor": (1,), "first": (6, 1, 1, 1), "second": (1, 4, 1, 1), "last": (1, 1, 1, 5)}
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
every_scale = pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t)[6:])


def sample(grid: Grid, shape: tuple[int, ...] = (1,), dtype=torch.float32, offset: bool = False):
    """`x (6, 4, 7, 5)` inside, outside, exactly on codes, clip bounds and half-way; `scale`, `offset`, `grad`."""
    # Powers of two: what ought to lie exactly on an edge does, in every type.
    scale = 2.0 ** torch.randint(-3, 1, shape)
    o = torch.randint(-4, 4, shape) * scale / 4 if offset else None
    v = torch.empty(6, 4, 7, 5).uniform_(grid.qmin * 1.2 - 1, grid.qmax * 1.2)
    edges = torch.tensor(
        [grid.qmin, grid.qmax, grid.qmin + 0.5, grid.qmax - 0.5, grid.qmin - 0.5, grid.qmax + 0.5, 1.5]
    )
    at = torch.rand(v.shape) < 0.5
    v = torch.where(at, edges[torch.randint(len(edges), v.shape)], v)
    x = v * scale if o is None else v * scale + o
    return x.to(dtype), scale, o, torch.randn(x.shape).to(dtype)


def formula(x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, grad: Tensor):
    """Value, gradient of `x`, and the summand of the gradient of the scale, in float64, case by case."""
    x, grad, s = x.double(), grad.double(), scale.double()
    o = torch.zeros_like(s) if offset is None else offset.double()
    v = (x - o) / s
    inside = (v >= grid.qmin) & (v <= grid.qmax)
    error = v.round() - v if grid.through_rounding else torch.zeros_like(v)
    bound = torch.where(v < grid.qmin, float(grid.qmin), float(grid.qmax))
    value = torch.where(inside, v.round(), bound) * s + o
    return value, torch.where(inside, grad, 0.0), torch.where(inside, error, bound) * grad


@every_grid
@every_scale
@every_type
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
def test_eager_is_the_formula_to_the_bit(grid: Grid, shape, dtype: torch.dtype, offset: bool):
    x, scale, o, grad = sample(grid, shape, dtype, offset)
    value, grad_x, terms = formula(x, scale, o, grid, grad)
    assert torch.equal(quantize_forward(x, scale, o, grid), value.to(dtype))
    with torch.no_grad():  # as autograd runs a backward
        actual_x, actual_terms = eager_backend.backward(grad, x, scale, o, grid, need_terms=True)
        for of_scale in (True, False):
            assert torch.equal(quantize_backward(grad, x, scale, o, grid, of_scale)[0], actual_x)
        total = quantize_backward(grad, x, scale, o, grid, of_scale=True)[1]
    assert actual_x.dtype == dtype and torch.equal(actual_x, grad_x.to(dtype))
    assert_close(actual_terms.double(), terms, rtol=1e-6, atol=0)  # one product in float32
    # Sums of at most 840 of them: each addition rounds what has been added so far.
    spread = terms.abs().sum_to_size(shape).max().item()
    assert_close(total.double(), terms.sum_to_size(shape), rtol=0, atol=1e-6 * spread)
    plain = gradient_terms(grad, x, scale, o, *torch.tensor([grid.qmin, grid.qmax]), grid.through_rounding, True)
    assert torch.equal(plain[0], actual_x) and torch.equal(plain[1], actual_terms)


@every_grid
@every_type
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_blocks_change_no_gradient(grid: Grid, dtype: torch.dtype, offset: bool, layout: str, monkeypatch):
    """In blocks of 100 elements, the last of 40, all terms are those of whole tensors to the bit."""
    x, scale, o, grad = sample(grid, (1,), dtype, offset)
    arrange = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "permuted": lambda t: t.permute(2, 0, 3, 1),
    }[layout]
    x, grad = arrange(x), arrange(grad)
    with torch.no_grad():
        whole_x, whole_terms = eager_backend.backward(grad, x, scale, o, grid, need_terms=True)
        monkeypatch.setattr(blocks, "_block_size", lambda: 100)
        seen = []
        compute = blocks._gradient_terms

        def watch(*args):
            seen.append(compute(*args).clone())
            return args[-1]

        monkeypatch.setattr(blocks, "_gradient_terms", watch)
        grad_x, total = quantize_backward(grad, x, scale, o, grid, of_scale=True)
    assert [len(block) for block in seen] == [100] * 8 + [40]
    assert torch.equal(grad_x, whole_x) and grad_x.stride() == x.stride() and grad_x.dtype == grad.dtype
    in_memory = torch.cat(seen)
    assert torch.equal(in_memory.as_strided(x.shape, x.stride()), whole_terms)
    assert total.shape == (1,) and torch.equal(total, blocks.sum_of_terms(whole_terms))
    assert torch.equal(total, torch.stack([block.sum() for block in seen]).sum().reshape(1))


def test_large_tensors_of_one_scale_go_through_blocks(monkeypatch):
    """What lies between is as large as a block, whatever the size of the operands."""
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    x, grad = torch.randn(2, 100_000)
    sizes: list[int] = []
    compute = blocks._gradient_terms
    monkeypatch.setattr(
        blocks, "_gradient_terms", lambda *args: sizes.append(args[-1].untyped_storage().nbytes()) or compute(*args)
    )
    with torch.no_grad():
        quantize_backward(grad, x, torch.tensor([0.3]), None, Grid(-8, 7), of_scale=True)
    assert set(sizes) == {4 * 1000 * torch.get_num_threads()}


def layouts() -> dict[str, Tensor]:
    x = sample(Grid(-8, 7))[0]
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(2, 0, 3, 1),
        "gaps": x[:, :, ::2],
        "expanded": x[:1].expand(3, -1, -1, -1),
        "one": x[:1, :1, :1, :1],
        "empty": x[:0],
        "no dimensions": x[0, 0, 0, 0],
    }


def check_layouts() -> None:
    """Every layout gives the values and gradients of a contiguous copy; dense ones come out as they went in."""
    for name, x in layouts().items():
        grad = torch.randn(x.shape)
        results = []
        for operand in (x, x.clone(memory_format=torch.contiguous_format)):
            leaf, scale = operand.detach().requires_grad_(), torch.tensor([0.3], requires_grad=True)
            x_q = affine_fake_quantize(leaf, scale, None, -8, 7)
            results.append((x_q, *torch.autograd.grad(x_q, (leaf, scale), grad)))
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected, rtol=1e-6, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        if name in ("contiguous", "channels_last", "permuted"):
            assert results[0][0].stride() == x.stride()


def test_memory_layouts():
    check_layouts()


def test_an_expanded_gradient_and_one_of_another_layout():
    x = layouts()["channels_last"].requires_grad_()
    scale = torch.tensor([0.3], requires_grad=True)
    for grad in (torch.ones(()).expand(x.shape), torch.randn(x.shape)):
        a = torch.autograd.grad(affine_fake_quantize(x, scale, None, -8, 7), (x, scale), grad)
        _, grad_x, terms = formula(x.detach(), scale.detach(), None, Grid(-8, 7), grad)
        assert_close(a[0].double(), grad_x)
        assert_close(a[1].double(), terms.sum().reshape(1), rtol=1e-5, atol=1e-4)


def test_values_that_are_not_numbers_are_not_hidden():
    x = torch.tensor([1.0, torch.nan], requires_grad=True)
    scale = torch.tensor([0.3], requires_grad=True)
    x_q = affine_fake_quantize(x, scale, None, -8, 7)
    x_q.sum().backward()
    assert x_q[1].isnan() and scale.grad.isnan()


def test_double_backward_differentiates_the_formula():
    x = torch.tensor([0.1, 0.25, -0.4, 9.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(
        affine_fake_quantize(x, scale, None, -8, 7).square().sum(), scale, create_graph=True
    )
    second = torch.autograd.grad(first, (x, scale))
    # d/ds sum(x_q^2) = sum(2 x_q ds) with x_q differentiated straight through and ds = round(x/s) - x/s inside:
    v = x.detach() / 0.3
    inside = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    q = v.round().clamp(-8, 7)
    ds = q - v * inside
    expected_x = 2 * inside * ds - 2 * q * 0.3 * inside / 0.3
    expected_s = (2 * ds * ds + 2 * q * 0.3 * inside * v / 0.3).sum()
    assert_close(second[0], expected_x)
    assert_close(second[1], expected_s.reshape(1))


# Which backend ------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    """Whatever a test does to the choice of the backend is undone."""
    for name in ("_backend", "_quantized_elements", "_impossible"):
        monkeypatch.setattr(choice, name, getattr(choice, name))


@pytest.fixture
def calls(monkeypatch, backend) -> list[str]:
    """Names of the formulas that were asked for in compiled form; they run uncompiled."""
    names: list[str] = []

    def uncompiled(function):
        names.append(function.__name__)
        return function

    monkeypatch.setattr(compiled, "_compiled", uncompiled)
    return names


def quantize_once(x: Tensor) -> Tensor:
    return quantize_forward(x, torch.tensor([0.3]), None, Grid(-8, 7))


def test_auto_compiles_large_tensors_once_it_has_seen_enough(calls, monkeypatch):
    set_backend("auto")
    large, small = torch.randn(choice.SMALLEST), torch.randn(choice.SMALLEST - 1)
    monkeypatch.setattr(choice, "_quantized_elements", 0)
    monkeypatch.setattr(choice, "PAYS_AFTER", 2 * choice.SMALLEST)
    for expected in (0, 0, 1):
        quantize_once(small)
        quantize_once(large)
        assert len(calls) == expected


def test_eager_never_compiles_and_compiled_always(calls):
    x = torch.randn(100)
    set_backend("eager")
    quantize_once(x)
    assert not calls
    assert set_backend("compiled") == "eager"
    quantize_once(x)
    assert calls == ["fake_quantized"]


def test_where_compiled_code_cannot_go(calls):
    set_backend("compiled")
    x = torch.randn(100)
    expected = quantize_once(x)
    calls.clear()
    quantize_once(x.double())
    with FlopCounterMode(display=False):
        assert torch.equal(quantize_once(x), expected)
    with torch.device("cpu"):
        assert torch.equal(quantize_once(x), expected)
    with torch._subclasses.FakeTensorMode() as mode:
        assert quantize_once(mode.from_tensor(x)).shape == x.shape
    assert quantize_forward(x.to("meta"), torch.ones(1, device="meta"), None, Grid(-8, 7)).shape == x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap tells that in-place operations are slow
        assert torch.equal(torch.func.vmap(quantize_once)(x.view(10, 10)), expected.view(10, 10))
    assert not calls


def test_without_a_compiler_eager_goes_on_with_one_warning(monkeypatch, backend):
    def broken(function):
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(compiled, "_compiled", broken)
    set_backend("eager")
    x = torch.randn(100)
    expected = quantize_once(x)
    set_backend("compiled")
    with pytest.warns(UserWarning, match=r"runs uncompiled.*RuntimeError: no g\+\+ here.*HF_SAQ_KERNELS=eager"):
        assert torch.equal(quantize_once(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(quantize_once(x), expected)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (InvalidCxxCompiler(), r"InvalidCxxCompiler: No working C\+\+ compiler found .*Install a C\+\+ compiler"),
        (BackendCompilerFailed(None, InvalidCxxCompiler(), None), r"InvalidCxxCompiler: No working .*Install a C\+\+"),
        (BackendCompilerFailed(None, KeyError("x"), None), r"failed with KeyError: 'x'\. Set HF_SAQ_KERNELS=eager to"),
        (AssertionError(), r"failed with AssertionError: \(no message\)\. Set HF_SAQ_KERNELS=eager to"),
    ],
    ids=["no_compiler", "wrapped", "a_bug", "no_message"],
)
def test_advice_fits_what_went_wrong(error: Exception, advice: str, monkeypatch, backend):
    def broken(function):
        raise error

    monkeypatch.setattr(compiled, "_compiled", broken)
    set_backend("compiled")
    with pytest.warns(UserWarning, match=advice):
        quantize_once(torch.randn(100))


@pytest.fixture
def traced(monkeypatch, backend) -> list:
    """Formulas that were compiled, each once; dynamo traces them, and eager operations run in place of a compiler."""
    formulas: list = []

    @functools.cache
    def traced_alone(formula):
        formulas.append(formula)
        return torch.compile(formula, dynamic=True, fullgraph=True, backend="eager")

    monkeypatch.setattr(compiled, "_compiled", traced_alone)
    monkeypatch.setattr(compiled, "_left_uncompiled", set())
    compiled._of_one_kind.cache_clear()
    set_backend("compiled")
    return formulas


def test_comparing_all_quantizers_in_one_process_keeps_kernels_compiled(traced):
    """Quantizers x bits x scales x shapes x types: each kind of use is compiled once, none more often than torch lets.

    Compared with eager, to the bit.
    """
    shapes = ((4, 5), (4, 3, 2, 2))
    for name in sorted(QUANTIZERS):
        for bits, dtype, shape, channel in itertools.product((2, 8), (torch.float32, torch.bfloat16), shapes, (0, 1)):
            scale_shape = (4, *(1 for _ in shape[1:])) if channel else (1,)
            quantizer = quantizer_class(name)(QuantizerSettings(bits, "weight", True, scale_shape))
            quantizer.initialize(torch.randn(shape))
            x = torch.randn(shape, dtype=dtype, requires_grad=True)
            results = []
            for choice_of in ("eager", "compiled"):
                set_backend(choice_of)
                x_q = quantizer(x)
                results.append((x_q, *torch.autograd.grad(x_q.float().square().sum(), [x, *quantizer.parameters()])))
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), (name, bits, dtype, shape)
    assert len(traced) > torch._dynamo.config.recompile_limit and not compiled._left_uncompiled
    for formula in traced:
        assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(formula.__code__)) <= 2, formula


def test_a_kind_that_torch_compiles_no_more_is_named_truly_and_alone(traced):
    """One element along a dimension needs code of its own; with a limit of one there is none for it."""
    grid, offset = Grid(-8, 7), torch.tensor([0.1])
    scale = torch.rand(4, 1) + 0.1
    wide, narrow = torch.randn(4, 6), torch.randn(4, 1)
    with torch._dynamo.config.patch(recompile_limit=1):
        quantize_forward(wide, scale, None, grid)
        with pytest.warns(UserWarning, match=r"one kind .* more than 1 times .*recompile_limit\)\. Raise that limit"):
            found = quantize_forward(narrow, scale, None, grid)
        assert torch.equal(found, eager_backend.forward(narrow, scale, None, grid))
        before = len(traced)
        quantize_forward(wide, scale, None, grid)  # of that kind: no second warning
        quantize_forward(wide, offset, offset, grid)
        assert len(traced) == before + 1 and not choice._impossible


def test_an_unknown_backend_is_refused(backend, monkeypatch):
    with pytest.raises(ValueError, match=r"set_backend\('fast'\): expected one of \['auto', 'eager', 'compiled'\]"):
        set_backend("fast")
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(ValueError, match="HF_SAQ_KERNELS='fast'; expected one of"):
        choice._initial()
    monkeypatch.setenv(choice.VARIABLE, "eager")
    assert choice._initial() == "eager"


def test_compiled_adds_as_eager_does(calls, monkeypatch):
    """So that it does not matter after how many steps compiled code takes over: a run resumes to the bit."""
    monkeypatch.setattr(blocks, "_block_size", lambda: 100)
    x, scale, o, grad = sample(Grid(-8, 7))
    sums = []
    for name in ("eager", "compiled"):
        set_backend(name)
        with torch.no_grad():
            sums.append(quantize_backward(grad, x, scale, o, Grid(-8, 7), of_scale=True)[1])
    assert calls == ["gradient_terms"] and torch.equal(*sums)


def both_backends(grid: Grid, shape: tuple[int, ...], dtype: torch.dtype, offset: bool):
    x, scale, o, grad = sample(grid, shape, dtype, offset)
    leaves = [t.requires_grad_() for t in (x, scale, o) if t is not None]
    results = []
    for name in ("eager", "compiled"):
        set_backend(name)
        x_q = affine_fake_quantize(x, scale, o, grid.qmin, grid.qmax, 0.37, grid.through_rounding)
        results.append((x_q, *torch.autograd.grad(x_q, leaves, grad)))
    return zip(*results, strict=True)


def test_compiled_is_eager_to_the_bit(backend):
    """One compilation of each of the two formulas serves bits, signs, sizes and layouts."""
    for grid in GRIDS.values():
        if grid.through_rounding:
            for eager, fast in both_backends(grid, (1,), torch.float32, offset=False):
                assert torch.equal(eager, fast)
    check_layouts()
    assert not choice._impossible


@pytest.mark.slow
@every_scale
@every_type
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
def test_compiled_is_eager_to_the_bit_everywhere(shape, dtype: torch.dtype, offset: bool, backend):
    torch._dynamo.reset()
    for grid in GRIDS.values():
        for slow, fast in both_backends(grid, shape, dtype, offset):
            assert torch.equal(slow, fast)
    assert not choice._impossible
