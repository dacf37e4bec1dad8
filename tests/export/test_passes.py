"""Each pass on a graph of a few nodes: what ONNX's own reference evaluates before and after, and what is gone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from hf_saq.export import passes
from hf_saq.export.checks.spans import computed

RNG = np.random.default_rng(0)
CODES = RNG.integers(-8, 8, (6, 4, 3, 3)).astype(np.int8)
CHANNELS = {name: RNG.normal(size=6).astype(np.float32) for name in ("gamma", "beta", "mean")}
CHANNELS["variance"] = RNG.uniform(0.5, 2, 6).astype(np.float32)
SCALES = RNG.uniform(0.01, 0.2, 6).astype(np.float32)
IMAGES = RNG.normal(size=(2, 4, 5, 5)).astype(np.float32)


def graph_of(body: str, shape: str = "4, 5, 5", output: str = "float y", **constants: np.ndarray) -> ir.Model:
    """A graph from `x` to `y` in ONNX's text format, with constants as initializers."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[batch, {shape}] x) => ({output}) {{ {body} }}'
    proto = parser.parse_model(text.replace("layer.", "layer__"))
    for node in proto.graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), name.replace("__", ".")) for name, value in constants.items()
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def evaluate(model: ir.Model, x: np.ndarray = IMAGES) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return ReferenceEvaluator(proto).run(None, {"x": x})[0]


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


QUANTIZED_X = "q = QuantizeLinear (x, s, z) c = Clip (q, low, high) x_q = DequantizeLinear (c, s, z) "
GRID = {"s": np.float32(0.3), "z": np.uint8(8), "low": np.uint8(0), "high": np.uint8(15)}
WEIGHT = "w = DequantizeLinear <axis = 0> (layer.codes, layer.scale) "
CONVOLUTION = {"layer__codes": CODES, "layer__scale": SCALES, "bias": CHANNELS["beta"] * 2}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_batch_norms_are_folded(per_channel: bool, with_bias: bool):
    constants = {**GRID, **CONVOLUTION, **CHANNELS}
    constants["gamma"] = constants["gamma"].copy()
    constants["gamma"][2] = 0  # a channel that is switched off
    assert (constants["gamma"] < 0).any() and (constants["gamma"] > 0).any()
    if not per_channel:
        constants["layer__scale"] = np.float32(0.05)
    if not with_bias:
        del constants["bias"]
    body = QUANTIZED_X + WEIGHT + f"h = Conv <pads = [1, 1, 1, 1]> (x_q, w{', bias' if with_bias else ''}) "
    model = graph_of(body + "y = BatchNormalization (h, gamma, beta, mean, variance)", **constants)
    before = evaluate(model)
    assert list(passes.fold_batch_norms(model)) == ["layer"]
    np.testing.assert_allclose(evaluate(model), before, atol=2e-6, rtol=2e-6)
    assert "BatchNormalization" not in kinds(model)
    codes = model.graph.initializers["layer.codes"].const_value.numpy()
    assert np.array_equal(codes, CODES * np.sign(constants["gamma"]).astype(np.int8)[:, None, None, None])


def test_a_code_without_an_opposite_keeps_its_batch_norm():
    codes = CODES.copy()
    codes[np.argmin(CHANNELS["gamma"]), 0, 0, 0] = -128
    body = QUANTIZED_X + WEIGHT + "h = Conv (x_q, w, bias) y = BatchNormalization (h, gamma, beta, mean, variance)"
    model = graph_of(body, **{**GRID, **CONVOLUTION, **CHANNELS, "layer__codes": codes})
    assert passes.fold_batch_norms(model) == {} and "BatchNormalization" in kinds(model)


def test_a_batch_norm_of_a_value_that_others_use_stays():
    body = QUANTIZED_X + WEIGHT + "h = Conv (x_q, w) b = BatchNormalization (h, gamma, beta, mean, variance)"
    model = graph_of(body + "y = Add (h, b)", **{**GRID, **CONVOLUTION, **CHANNELS})
    assert passes.fold_batch_norms(model) == {}


@pytest.mark.parametrize("zero_point", [0, 8])
@pytest.mark.parametrize("function", ["Relu (x)", "Clip (x, nought, six)", "Clip (x, nought, two)"])
def test_relus_become_the_range_of_codes(function: str, zero_point: int):
    """Zero point 0 needs nothing, 8 a lower bound; 2 is inside of the grid, 6 is not, for which 8 bits have room."""
    for clip, scale in ((True, 0.3), (False, 0.02)):
        chain = "c = Clip (q, low, high) y = DequantizeLinear (c, s, z)" if clip else "y = DequantizeLinear (q, s, z)"
        grid = {**GRID, "s": np.float32(scale), "z": np.uint8(zero_point)}
        bounds = {"nought": np.float32(0), "six": np.float32(6), "two": np.float32(2)}
        model = graph_of(f"r = {function} q = QuantizeLinear (r, s, z) {chain}", **grid, **bounds)
        x = np.concatenate([IMAGES, 4 * IMAGES, np.round(IMAGES) * scale / 2])
        before = evaluate(model, x)
        assert passes.fold_relus_into_codes(model) == 1
        assert kinds(model)[0] == "QuantizeLinear" and "Relu" not in kinds(model)
        assert np.array_equal(evaluate(model, x), before)


@pytest.mark.parametrize(
    "body",
    [
        "r = Relu (x) q = QuantizeLinear (r, s, z) d = DequantizeLinear (q, s, z) y = Add (d, r)",
        "r = Clip (x, low_float, six) q = QuantizeLinear (r, s, z) y = DequantizeLinear (q, s, z)",
    ],
    ids=["used otherwise", "not from zero"],
)
def test_what_is_no_relu_of_codes_stays(body: str):
    model = graph_of(body, **GRID, six=np.float32(6), low_float=np.float32(-1))
    assert passes.fold_relus_into_codes(model) == 0


@pytest.mark.parametrize("zero_point", [0, 8])
def test_pads_become_those_of_the_convolution(zero_point: int):
    body = "p = Pad (x, pads, nought) q = QuantizeLinear (p, s, z) c = Clip (q, low, high) "
    body += "x_q = DequantizeLinear (c, s, z) " + WEIGHT + "y = Conv <pads = [0, 1, 0, 1], strides = [2, 2]> (x_q, w)"
    grid = {**GRID, "z": np.uint8(zero_point)}
    constants = {"pads": np.array([0, 0, 0, 1, 0, 0, 2, 0]), "nought": np.float32(0)}
    model = graph_of(body, **grid, **CONVOLUTION, **constants)
    before = evaluate(model)
    assert passes.move_pads_behind_codes(model) == 1
    assert np.array_equal(evaluate(model), before)
    assert "Pad" not in kinds(model)
    convolution = next(node for node in model.graph if node.op_type == "Conv")
    assert list(convolution.attributes["pads"].as_ints()) == [0, 2, 2, 1]


def test_pads_of_something_else_stay():
    body = "p = Pad (x, pads, one) q = QuantizeLinear (p, s, z) x_q = DequantizeLinear (q, s, z) " + WEIGHT
    constants = {"pads": np.array([0, 0, 0, 1, 0, 0, 2, 0]), "one": np.float32(1)}
    model = graph_of(body + "y = Conv (x_q, w)", **GRID, **CONVOLUTION, **constants)
    assert passes.move_pads_behind_codes(model) == 0 and "Pad" in kinds(model)


@pytest.mark.parametrize("per_channel", [True, False])
def test_linear_layers_become_products_with_stored_codes(per_channel: bool):
    """`Gemm` of matrices, and a transposed weight, as torch's exporter writes them."""
    codes, scale = CODES.reshape(6, 36), SCALES if per_channel else np.float32(0.1)
    x = RNG.normal(size=(3, 36)).astype(np.float32)
    constants = {**GRID, "layer__codes": codes, "layer__scale": scale, "bias": CHANNELS["beta"]}
    for body in ("y = Gemm <transB = 1> (x_q, w, bias)", "t = Transpose <perm = [1, 0]> (w) y = MatMul (x_q, t)"):
        model = graph_of(QUANTIZED_X + WEIGHT + body, "36", **constants)
        before = evaluate(model, x)
        assert passes.transpose_stored_weights(model) + passes.gemms_to_matmuls(model) == 1
        np.testing.assert_allclose(evaluate(model, x), before, atol=1e-6, rtol=1e-6)
        assert not {"Gemm", "Transpose"} & set(kinds(model)) and "MatMul" in kinds(model)
        assert np.array_equal(model.graph.initializers["layer.codes"].const_value.numpy(), codes.T)


def test_linear_layers_of_float_inputs_are_left_alone():
    """ONNX Runtime would quantize those inputs."""
    constants = {"layer__codes": CODES.reshape(6, 36), "layer__scale": SCALES, "bias": CHANNELS["beta"]}
    for body in ("y = Gemm <transB = 1> (x, w, bias)", "t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)"):
        model = graph_of(WEIGHT + body, "36", **constants)
        assert passes.transpose_stored_weights(model) + passes.gemms_to_matmuls(model) == 0


@pytest.mark.parametrize(("high", "factor"), [(15, 8), (255, 8)])
def test_codes_are_widened_by_a_power_of_two(high: int, factor: int):
    """-8 times 16 has no place beside its opposite, 127; and with inputs of 8 bits 64 is the largest that is safe."""
    model = graph_of(
        QUANTIZED_X + WEIGHT + "y = Conv (x_q, w, bias)", **{**GRID, "high": np.uint8(high)}, **CONVOLUTION
    )
    before = evaluate(model)
    assert passes.widen_codes(model) == 1
    assert np.array_equal(evaluate(model), before)
    assert np.array_equal(model.graph.initializers["layer.codes"].const_value.numpy(), CODES * factor)


def test_codes_are_narrowed_to_four_bits():
    model = graph_of(QUANTIZED_X + WEIGHT + "y = Conv (x_q, w, bias)", **GRID, **CONVOLUTION)
    before = evaluate(model)
    assert passes.narrow_codes(model) == 1
    assert kinds(model)[-2:] == ["Conv", "Add"]  # its bias, which an engine would round
    stored = model.graph.initializers["layer.codes"].const_value
    assert stored.dtype == ir.DataType.INT4 and len(stored.tobytes()) == CODES.size // 2
    np.testing.assert_allclose(evaluate(model), before, rtol=1e-6, atol=1e-6)
    wide = graph_of(QUANTIZED_X + WEIGHT + "y = Conv (x_q, w)", **GRID, layer__codes=CODES * 2, layer__scale=SCALES)
    assert passes.narrow_codes(wide) == 0


def test_shapes_and_metadata_are_dropped():
    model = graph_of(QUANTIZED_X + "y = Neg (x_q)", **GRID)
    assert len(ir.to_proto(model).graph.value_info) > 0
    for value in model.graph.initializers.values():
        value.metadata_props["told"] = "something"
    passes.forget_shapes(model)
    assert not ir.to_proto(model).graph.value_info
    assert evaluate(model).shape == IMAGES.shape


# Saturation ----------------------------------------------------------------------------------------------------------


def saturating_product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`x @ w` as AVX2 computes it: sums of two neighbouring products in 16 bits, saturating, those in 32.

    Args:
        x: uint8 codes `(n, k)`, with `k` even.
        w: int8 codes `(k, m)`.
    """
    products = x.astype(np.int64)[:, :, None] * w.astype(np.int64)[None]
    pairs = products[:, ::2] + products[:, 1::2]
    return pairs.clip(-(2**15), 2**15 - 1).sum(1)


@pytest.mark.parametrize(("bits", "high"), [(8, 255), (8, 127), (7, 255), (4, 255), (8, 15)])
def test_what_may_saturate_is_known(bits: int, high: int):
    """Over the worst codes of each width, in every order of the rows."""
    w = np.full((8, 3), 2 ** (bits - 1) - 1, dtype=np.int8)
    w[:, 1] = -(2 ** (bits - 1))
    x = np.full((1, 8), high, dtype=np.uint8)
    exact = x.astype(np.int64) @ w.astype(np.int64)
    assert passes.may_saturate(w, 1, high) == (saturating_product(x, w) != exact).any() == (bits == 8 and high == 255)


def test_one_large_code_alone_does_not_saturate():
    w = np.zeros((8, 2), dtype=np.int8)
    w[3] = 127
    w[5] = -128
    assert not passes.may_saturate(w, 1, 255)
    w[4, 1] = 2
    assert passes.may_saturate(w, 1, 255)


def test_layers_that_may_saturate_are_split():
    w = RNG.integers(-128, 128, (36, 6)).astype(np.int8)
    x = RNG.uniform(0, 20, (3, 36)).astype(np.float32)
    grid = {"s": np.float32(0.05), "z": np.uint8(0)}
    body = "q = QuantizeLinear (x, s, z) x_q = DequantizeLinear (q, s, z) w = DequantizeLinear (layer.codes, s) "
    model = graph_of(
        body + "h = MatMul (x_q, w) y = Sub (h, bias)", "36", layer__codes=w, bias=CHANNELS["beta"], **grid
    )
    before = evaluate(model, x)
    assert passes.saturating_layers(model) == ["layer"]
    assert passes.split_saturating_layers(model) == ["layer"]
    np.testing.assert_allclose(evaluate(model, x), before, rtol=1e-6, atol=1e-4)  # sums of up to 650
    assert np.array_equal(model.graph.initializers["layer.codes"].const_value.numpy(), w)  # stored once
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    halves = computed(product.inputs[1].producer().inputs[0]).astype(np.int8)
    codes = np.round(x / grid["s"]).clip(0, 255).astype(np.uint8)
    exact = codes.astype(np.int64) @ w.astype(np.int64)
    assert (saturating_product(codes, w) != exact).any()
    assert np.array_equal(saturating_product(np.concatenate([codes, codes], 1), halves), exact)


def test_convolutions_are_split_too_unless_they_are_depthwise():
    grid = {"s": np.float32(0.02), "z": np.uint8(0)}
    body = "q = QuantizeLinear (x, s, z) x_q = DequantizeLinear (q, s, z) w = DequantizeLinear (layer.codes, s) "
    wide = (CODES * 16).astype(np.int8)
    model = graph_of(body + "y = Conv <pads = [1, 1, 1, 1]> (x_q, w, bias)", **grid, layer__codes=wide, bias=SCALES)
    before = evaluate(model)
    assert passes.split_saturating_layers(model) == ["layer"]
    np.testing.assert_allclose(evaluate(model), before, rtol=1e-5, atol=1e-5)
    depthwise = graph_of(body + "y = Conv <group = 4> (x_q, w)", **grid, layer__codes=wide[:4, :1])
    assert passes.split_saturating_layers(depthwise) == passes.saturating_layers(depthwise) == []
    grouped = graph_of(body + "y = Conv <group = 2> (x_q, w)", **grid, layer__codes=wide[:, :2])
    assert passes.split_saturating_layers(grouped) == [] and passes.saturating_layers(grouped) == ["layer"]


# Size ----------------------------------------------------------------------------------------------------------------


def test_masks_that_mask_nothing_are_dropped():
    body = "z = Neg (x) shape = Shape (x) all = Expand (holds, shape) mask = Where (all, nought, low) y = Add "
    for inputs in ("(z, mask)", "(mask, z)"):
        constants = {"holds": np.ones((1, 1, 1, 1), dtype=bool), "nought": np.float32(0), "low": np.float32(-9)}
        model = graph_of(body + inputs, **constants)
        before = evaluate(model)
        assert passes.drop_open_masks(model) == 1 and "Add" not in kinds(model)
        assert np.array_equal(evaluate(model), before)
        for change in ({"holds": np.zeros((1, 1, 1, 1), dtype=bool)}, {"nought": np.float32(1)}):
            assert passes.drop_open_masks(graph_of(body + inputs, **{**constants, **change})) == 0


def test_names_between_nodes_are_dropped():
    model = graph_of(QUANTIZED_X + WEIGHT + "y = Conv (x_q, w, bias)", **GRID, **CONVOLUTION)
    before, names = evaluate(model), set(model.graph.initializers)
    passes.forget_names(model)
    proto = ir.to_proto(model)
    assert not any(node.name for node in proto.graph.node)
    assert {name for node in proto.graph.node for name in node.output} == {"0", "1", "2", "3", "y"}
    assert set(model.graph.initializers) == names
    assert np.array_equal(evaluate(model), before)


@pytest.mark.parametrize("sum_", ["Add (h, bias)", "Add (bias, h)"])
def test_a_bias_before_a_gelu_is_subtracted(sum_: str):
    constants = {"w": RNG.normal(size=(5, 3)).astype(np.float32), "bias": RNG.normal(size=3).astype(np.float32)}
    model = graph_of(f"h = MatMul (x, w) b = {sum_} y = Gelu (b)", "4, 5", **constants)
    x = RNG.normal(size=(2, 4, 5)).astype(np.float32)
    before = evaluate(model, x)
    assert passes.subtract_biases_before_gelus(model) == 1 and kinds(model) == ["MatMul", "Sub", "Gelu"]
    assert np.array_equal(evaluate(model, x), before)


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul (x, w) b = Add (h, bias) g = Gelu (b) y = Add (g, b)",
        "h = MatMul (x, w) b = Add (h, h) y = Gelu (b)",
        "h = MatMul (x, w) b = Add (h, bias) y = Relu (b)",
    ],
    ids=["used otherwise", "no constant", "no Gelu"],
)
def test_other_sums_stay(body: str):
    constants = {"w": RNG.normal(size=(5, 3)).astype(np.float32), "bias": RNG.normal(size=3).astype(np.float32)}
    assert passes.subtract_biases_before_gelus(graph_of(body, "4, 5", **constants)) == 0


# Windows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", [0, 8])
@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        (3, "pads = [1, 2, 0, 1]"),
        (3, "pads = [1, 1, 1, 1], strides = [2, 1]"),
        (1, "strides = [2, 2]"),
        (1, "group = 1"),
    ],
    ids=["padded", "strided", "strided point", "point"],
)
def test_convolutions_become_products(kernel: int, attributes: str, zero_point: int):
    codes = RNG.integers(-8, 8, (6, 8, kernel, kernel)).astype(np.int8)
    x = RNG.normal(size=(2, 8, 6, 7)).astype(np.float32)
    constants = {**GRID, "z": np.uint8(zero_point), **CONVOLUTION, "layer__codes": codes}
    body = QUANTIZED_X + WEIGHT + f"h = Conv <{attributes}> (x_q, w, bias) y = Relu (h)"
    model = graph_of(body, "8, 6, 7", **constants)
    before = evaluate(model, x)
    assert passes.convolutions_to_products(model) == 1 and "Conv" not in kinds(model)
    np.testing.assert_allclose(evaluate(model, x), before, rtol=1e-5, atol=1e-5)
    assert model.graph.initializers["layer.codes"].const_value.shape == (8 * kernel**2, 6)


@pytest.mark.parametrize("patches_only", [True, False])
def test_patches_are_cut_out_by_reshaping(patches_only: bool):
    codes = RNG.integers(-8, 8, (6, 3, 2, 3)).astype(np.int8)  # too few channels for windows that overlap
    x = RNG.normal(size=(2, 3, 6, 9)).astype(np.float32)
    body = QUANTIZED_X + WEIGHT + "h = Conv <strides = [2, 3]> (x_q, w, bias) y = Relu (h)"
    model = graph_of(body, "3, 6, 9", **GRID, **{**CONVOLUTION, "layer__codes": codes})
    before = evaluate(model, x)
    assert passes.convolutions_to_products(model, patches_only) == 1 and "Slice" not in kinds(model)
    np.testing.assert_allclose(evaluate(model, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [("strides = [2, 2]", "8, 6, 7"), ("strides = [2, 2], pads = [1, 1, 1, 1]", "8, 6, 6"), ("group = 1", "8, 6, 6")],
    ids=["a column left over", "padded", "overlapping"],
)
def test_other_windows_are_no_patches(attributes: str, size: str):
    codes = RNG.integers(-8, 8, (6, 8, 2, 2)).astype(np.int8)
    body = QUANTIZED_X + WEIGHT + f"h = Conv <{attributes}> (x_q, w, bias) y = Relu (h)"
    model = graph_of(body, size, **GRID, **{**CONVOLUTION, "layer__codes": codes})
    assert passes.convolutions_to_products(model, patches_only=True) == 0


@pytest.mark.parametrize(
    "body",
    [
        "h = Conv (x_q, w) p = QuantizeLinear (h, s, z) y = DequantizeLinear (p, s, z)",
        "y = Conv <group = 2> (x_q, v)",
        "y = Conv <dilations = [2, 2]> (x_q, w)",
        "y = Conv (x, w)",
    ],
    ids=["quantized next", "grouped", "dilated", "float input"],
)
def test_other_convolutions_stay(body: str):
    codes = RNG.integers(-8, 8, (6, 8, 3, 3)).astype(np.int8)
    constants = {**GRID, **CONVOLUTION, "layer__codes": codes, "other": codes[:, :4]}
    other = "v = DequantizeLinear <axis = 0> (other, layer.scale) "
    model = graph_of(QUANTIZED_X + WEIGHT + other + body, "8, 6, 6", **constants)
    assert passes.convolutions_to_products(model) == 0


def test_bounds_of_codes_are_scalars():
    """`Clip` takes scalars; engines run what follows a vector in float."""
    model = graph_of("r = Relu (x) q = QuantizeLinear (r, s, z) y = DequantizeLinear (q, s, z)", **GRID)
    assert passes.fold_relus_into_codes(model) == 1
    clip = next(node for node in model.graph if node.op_type == "Clip")
    assert [value.const_value.shape for value in clip.inputs[1:]] == [(), ()]
