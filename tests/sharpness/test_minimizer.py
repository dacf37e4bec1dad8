"""The three cases against a plain-PyTorch reference, and the exactness of what is put back."""

import copy
import weakref

import pytest
import torch
from minimizer_nets import assert_same_state, batch, conv_net, linear_net, loss_of, quantized, state_of, two_passes
from reference import largest_difference, package_name, reference_gradients, to_reference, train_reference
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.sharpness import quantized_weights

CASES = (1, 2, 3)


@pytest.mark.parametrize("build", [linear_net, conv_net])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_gradients_equal_the_reference(build, case, adaptive):
    net = quantized(build)
    reference = to_reference(net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3, case=case, adaptive=adaptive)
    data = batch(net)
    expected = reference_gradients(reference, loss_of, [[data]], case, 0.3, "local", adaptive=adaptive)
    two_passes(net, minimizer, data)
    names = [name for name, _ in reference.named_parameters()]

    own = dict(net.named_parameters())
    moved = 0
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(own[package_name(name)].grad, value, atol=1e-6, rtol=1e-4, msg=name)
        moved += int(value.abs().max() > 1e-4)
    assert moved > len(names) / 2  # the comparison is not one of zeros


@pytest.mark.parametrize("build", [linear_net, conv_net])
@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_reference(build, case):
    """In float64: in float32 a last-bit difference sooner or later moves one value across a rounding edge."""
    net = quantized(build).double()
    reference = to_reference(net)
    batches = [batch(net, seed=k) for k in range(10)]
    steps = [[[(x.double(), y)]] for x, y in batches]
    train_reference(
        reference,
        loss_of,
        steps,
        torch.optim.SGD(reference.parameters(), lr=0.002, momentum=0.9),
        case=case,
        rho=0.2,
        sync="local",
    )
    minimizer = SharpnessAwareMinimizer(net, rho=0.2, case=case)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.002, momentum=0.9)
    for ((data,),) in steps:
        optimizer.zero_grad()
        two_passes(net, minimizer, data)
        optimizer.step()
    scales = [p for name, p in net.named_parameters() if name.endswith("scale")]
    assert min(p.min() for p in scales) > 0  # the reference has no floor
    assert largest_difference(net, reference) < 1e-10


def test_cases_differ():
    grads = {}
    for case in CASES:
        net = quantized(linear_net)
        two_passes(net, SharpnessAwareMinimizer(net, rho=0.5, case=case), batch(net))
        grads[case] = net[3].weight.grad
    assert not torch.allclose(grads[1], grads[3]) and not torch.allclose(grads[2], grads[3])


def test_steps_that_are_not_perturbed_leave_nothing_behind():
    """Plain steps and evaluation run as if there were no minimizer, and the next perturbed step as if it were the
    first."""
    net, fresh = quantized(linear_net), quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3)
    loss_of(net, batch(net, seed=5)).backward()
    net.zero_grad()
    net.eval()(batch(net)[0])
    net.train()
    assert not minimizer._seam.leaves and not minimizer._begun
    two_passes(net, minimizer, batch(net))
    two_passes(fresh, SharpnessAwareMinimizer(fresh, rho=0.3), batch(fresh))
    for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_plain_backward_is_no_first_pass():
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3)
    loss_of(net, batch(net)).backward()
    with pytest.raises(RuntimeError, match=r"without a first pass: .* `with minimizer\.ascent\(\):`"):
        with minimizer.perturbed():
            pass


@pytest.mark.parametrize("case", CASES)
def test_rho_zero_is_plain_training_bit_for_bit(case):
    net, plain = quantized(conv_net), quantized(conv_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.0, case=case)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (net, plain)]
    for k in range(10):
        data = batch(net, seed=k)
        optimizers[0].zero_grad()
        two_passes(net, minimizer, data)
        optimizers[0].step()
        optimizers[1].zero_grad()
        loss_of(plain, data).backward()
        optimizers[1].step()
    assert_same_state(net, plain.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_eps_has_norm_rho_and_is_gone_afterwards(case):
    net = quantized(conv_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.7, case=case)
    data, before = batch(net), state_of(net)
    with minimizer.ascent():
        loss_of(net, data).backward()
    updated = state_of(net)  # the first pass moved the running statistics, as plain training does
    with minimizer.perturbed() as eps:
        squares = [e.square().sum() for e in eps.outputs.values()]
        squares += [(p.detach() - before[n]).square().sum() for n, p in net.named_parameters()]
        loss_of(net, data).backward()
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.7, rel=1e-5)
    assert_same_state(net, updated)
    assert minimizer._eps is None and not minimizer._seam._added and not minimizer._seam.leaves


def test_earlier_gradients_are_set_aside():
    """Under accumulation the direction comes from this micro-batch alone, and gradients still add up."""
    net, other = quantized(linear_net), quantized(linear_net)
    first, second = batch(net, seed=0), batch(net, seed=1)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3)
    two_passes(net, minimizer, first)
    two_passes(net, minimizer, second)
    total = []
    for data in (first, second):
        other.zero_grad()
        two_passes(other, SharpnessAwareMinimizer(other, rho=0.3), data)
        total.append([p.grad.clone() for p in other.parameters()])
    for p, a, b in zip(net.parameters(), *total, strict=True):
        torch.testing.assert_close(p.grad, a + b, atol=1e-7, rtol=1e-6)


def test_several_first_passes_make_one_perturbation():
    """What `sync="global"` does with gradient accumulation, against the reference."""
    net = quantized(conv_net)
    reference = to_reference(net)
    batches = [batch(net, seed=k) for k in range(3)]
    expected = reference_gradients(reference, loss_of, [batches], 3, 0.3, "global")
    minimizer = SharpnessAwareMinimizer(net, rho=0.3, sync="global")
    for data in batches:
        with minimizer.ascent():
            (loss_of(net, data) / 3).backward()
    for data in batches:
        with minimizer.perturbed():
            (loss_of(net, data) / 3).backward()
    own = [p.grad for p in net.parameters()]
    for p, value in zip(own, sorted_like(net, reference, expected), strict=True):
        torch.testing.assert_close(p, value, atol=1e-6, rtol=1e-4)
    assert minimizer._eps is None


def sorted_like(net, reference, values):

    by_name = {package_name(n): v for (n, _), v in zip(reference.named_parameters(), values, strict=True)}
    return [by_name[name] for name, _ in net.named_parameters()]


def test_statistics_are_updated_once():
    net, plain = quantized(conv_net), quantized(conv_net)
    two_passes(net, SharpnessAwareMinimizer(net, rho=0.5), batch(net))
    loss_of(plain, batch(plain)).backward()
    for (name, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_both_passes_draw_the_same_random_numbers():
    net = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    quantize(net, SAQQuantizationConfig(weight_bits=4, activation_bits=None))
    masks = []
    net[1].register_forward_hook(lambda m, a, out: masks.append(out == 0))
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    data = torch.randn(8, 12), torch.randint(0, 4, (8,))
    torch.manual_seed(3)
    two_passes(net, minimizer, data)
    after = torch.rand(4)
    assert torch.equal(masks[0], masks[1]) and 0 < masks[0].float().mean() < 1
    torch.manual_seed(3)
    loss_of(net, data)
    assert torch.equal(after, torch.rand(4))  # and the generator stands where one pass would have left it


@pytest.mark.parametrize("stage", ["ascent", "perturbed"])
@pytest.mark.parametrize("case", CASES)
def test_an_exception_restores_everything(case, stage):
    net = quantized(conv_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.5, case=case)
    data = batch(net)
    for p in net.parameters():
        p.grad = torch.full_like(p, 2.0)
    if stage == "perturbed":
        with minimizer.ascent():
            loss_of(net, data).backward()
    before, rng = state_of(net), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        with minimizer.ascent() if stage == "ascent" else minimizer.perturbed():
            torch.rand(3)
            raise KeyboardInterrupt
    assert_same_state(net, before)
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in net.parameters())
    if stage == "perturbed":
        assert torch.equal(torch.get_rng_state(), rng)
    # and the next step is a normal one
    fresh = quantized(conv_net)
    fresh.load_state_dict(net.state_dict())
    for m in (net, fresh):
        m.zero_grad()
    two_passes(net, minimizer, data)
    two_passes(fresh, SharpnessAwareMinimizer(fresh, rho=0.5, case=case), data)
    for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("case", CASES)
def test_a_useless_norm_makes_a_plain_step(case, factor):
    net, plain = quantized(linear_net), quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.5, case=case)
    before = state_of(net)
    with minimizer.ascent():
        (loss_of(net, batch(net)) * factor).backward()
    with minimizer.perturbed():
        loss_of(net, batch(net)).backward()
    loss_of(plain, batch(plain)).backward()
    assert minimizer.skipped == 1
    assert_same_state(net, before)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Twice(nn.Module):
    """Runs one layer twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


@pytest.mark.parametrize("case", CASES)
def test_a_layer_that_runs_twice(case):
    """Gradients sum over both uses: compared with finite differences of the loss along eps."""
    net = Twice()
    quantize(net, SAQQuantizationConfig(weight_bits=4, activation_bits=None, first_last_bits=None))
    net.double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randint(0, 4, (16,))
    minimizer = SharpnessAwareMinimizer(net, rho=1e-6, case=case, perturb=["weight"])
    with minimizer.ascent():
        clean = loss_of(net, (x, y))
        clean.backward()
    with minimizer.perturbed():
        raised = loss_of(net, (x, y))
        raised.backward()
    rise = (raised - clean).item() / 1e-6
    if case == 1:  # by the slope g_q along g_w
        minimizer.detach()
        steepest = SharpnessAwareMinimizer(net, rho=1.0, perturb=["weight"])
        net.zero_grad()
        with steepest.recorded():
            loss_of(net, (x, y)).backward()
        g_w = {entry.quantizer: entry.weight.grad for entry in quantized_weights(net)}
        g_q = {quantizer: leaf.grad for quantizer, leaf in steepest._seam.leaves.items()}
        slope = sum((g_w[q] * g_q[q]).sum() for q in g_q) / torch.stack([g.norm() for g in g_w.values()]).norm()
        assert rise == pytest.approx(slope.item(), rel=1e-3) and rise > 0
    elif case == 2:  # rounding swallows so small an eps
        assert rise == 0
    else:  # steepest ascent
        assert rise == pytest.approx(minimizer.ascent_norm, rel=1e-3)


def test_tied_weights_get_one_eps_for_each_quantizer():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    net[2].weight = net[0].weight
    quantize(net, SAQQuantizationConfig(weight_bits=3, activation_bits=None, first_last_bits=None))
    assert net[2].weight is net[0].weight
    data = torch.randn(8, 6), torch.randint(0, 4, (8,))
    for case in CASES:
        net.zero_grad()
        before = state_of(net)
        minimizer = SharpnessAwareMinimizer(net, rho=0.3, case=case)
        with minimizer.ascent():
            loss_of(net, data).backward()
        with minimizer.perturbed() as eps:
            assert len(eps.outputs) == (0 if case == 2 else 3)
            assert sum(p is net[0].weight for p in eps.in_place) == (1 if case == 2 else 0)
            loss_of(net, data).backward()
        minimizer.detach()
        assert_same_state(net, before)
        assert torch.isfinite(net[0].weight.grad).all()


def test_frozen_and_unused_parameters():
    net = quantized(linear_net)
    net[0].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    unused = nn.Linear(3, 3)
    net[2].unused = unused
    before = state_of(net)
    two_passes(net, SharpnessAwareMinimizer(net, rho=0.5), batch(net))
    assert net[0].weight.grad is None and net[1].bias.grad is None and unused.weight.grad is None
    assert net[3].weight.grad is not None
    assert_same_state(net, before)


@pytest.mark.parametrize("kind", ["weight", "bias", "norm", "scale", "other"])
def test_scope_selects_one_kind(kind):
    net = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    quantize(net, SAQQuantizationConfig(modules_to_not_convert=["2"], first_last_bits=None))
    calibrate(net, [torch.randn(8, 12)])
    minimizer = SharpnessAwareMinimizer(net, rho=0.5, perturb=[kind])
    before = state_of(net)
    data = torch.randn(8, 12), torch.randint(0, 4, (8,))
    with minimizer.ascent():
        loss_of(net, data).backward()
    with minimizer.perturbed() as added:
        moved = {n for n, v in net.state_dict().items() if not torch.equal(v, before[n])}
        eps = [q.path for q in added.outputs]
    expected = {
        "weight": set(),
        "bias": {"0.bias", "2.bias"},
        "norm": {"1.weight", "1.bias"},
        "scale": {"0.weight_quantizer.scale", "0.activation_quantizer.scale"},
        "other": {"2.weight"},
    }
    assert moved == expected[kind]
    assert eps == (["0.weight_quantizer"] if kind == "weight" else [])


def test_step_sizes_of_weights_climb_along_with_weights():
    """Theirs lie behind `w_q`, whose gradient is caught: both kinds of first pass must let it through."""
    net, data = quantized(linear_net), batch(quantized(linear_net))
    reference = copy.deepcopy(net)
    loss_of(reference, data).backward()
    minimizer = SharpnessAwareMinimizer(net, rho=0.5, perturb=["weight", "scale"])
    scales = {n for n, _ in net.named_parameters() if "quantizer" in n}
    found = []
    for context in (minimizer.ascent, minimizer.recorded):
        with context():
            loss_of(net, data).backward()
        with minimizer.perturbed() as eps:
            found.append(eps.named(net))
        net.zero_grad()
        for n, p in reference.named_parameters():
            if n in scales:
                expected = 0.5 * p.grad / minimizer.ascent_norm
                torch.testing.assert_close(found[-1][n], expected, atol=1e-6, rtol=1e-4, msg=n)
    assert (
        set(found[0]) == set(found[1]) == scales | {"0.weight_quantizer", "3.weight_quantizer", "5.weight_quantizer"}
    )
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("perturb", [["weight", "bias", "norm"], ["weight"], ["norm"]], ids=str)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant, perturb):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, net, active):
            super().__init__()
            self.net, self.active = net, active

        def forward(self, x):
            x = self.net[0](x)
            rest = lambda h: self.net[1:](h)  # noqa: E731
            return checkpoint(rest, x, use_reentrant=reentrant) if self.active else rest(x)

    grads = []
    for active in (False, True):
        net = quantized(linear_net)
        model = Checkpointed(net, active).train()
        minimizer = SharpnessAwareMinimizer(model, rho=0.4, perturb=perturb)
        two_passes(model, minimizer, batch(net))
        assert minimizer.ascent_norm > 0
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments():
    net = quantized(linear_net)
    with pytest.raises(ValueError, match="rho=-1"):
        SharpnessAwareMinimizer(net, rho=-1)
    with pytest.raises(ValueError, match="case=4"):
        SharpnessAwareMinimizer(net, rho=0.1, case=4)
    for eta in (float("nan"), -0.1, float("inf")):
        with pytest.raises(ValueError, match=f"eta={eta}; expected a finite number >= 0"):
            SharpnessAwareMinimizer(net, rho=0.1, adaptive=True, eta=eta)
    with pytest.raises(ValueError, match=r"perturb=\('wait',\); expected a list of some of"):
        SharpnessAwareMinimizer(net, rho=0.1, perturb="wait")
    with pytest.raises(ValueError, match='selects no trainable tensor .* Quantize the model first, or add "other"'):
        SharpnessAwareMinimizer(linear_net()[:1], rho=0.1, perturb=["weight"])
    net.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"True of some of its {len(list(net.parameters()))} frozen parameters, or"):
        SharpnessAwareMinimizer(net, rho=0.1)


def test_one_kind_by_its_name():
    nets = [quantized(linear_net) for _ in range(2)]
    for net, perturb in zip(nets, ("weight", ["weight"]), strict=True):
        minimizer = SharpnessAwareMinimizer(net, rho=0.4, perturb=perturb)
        assert minimizer.perturb == ("weight",)
        two_passes(net, minimizer, batch(net))
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_copies_and_detach_leave_no_trace():
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3)
    assert not any("eps" in key or "leaf" in key for key in net.state_dict())
    twin = copy.deepcopy(net)
    with minimizer.ascent():
        loss_of(twin, batch(net)).backward()  # a copy is not observed
        assert all(leaf.grad is None for leaf in minimizer._seam.leaves.values())
    minimizer.detach()
    before = len(net[0].weight_quantizer._forward_hooks)
    loss_of(net, batch(net)).backward()
    assert before == 0 and not minimizer._seam.leaves and not minimizer._begun


def test_eps_takes_one_buffer():
    """Between the passes there is one tensor of the weight's size, the gradient's own memory."""
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3)
    with minimizer.ascent():
        loss_of(net, batch(net)).backward()
    leaf = next(iter(minimizer._seam.leaves.values()))
    assert leaf.untyped_storage().nbytes() == leaf.element_size()
    pointer = leaf.grad.data_ptr()
    with minimizer.perturbed() as added:
        assert pointer in {eps.data_ptr() for eps in added.outputs.values()}
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("case", CASES)
def test_the_first_pass_computes_no_gradient_that_is_not_needed(case):
    net = quantized(conv_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3, case=case, perturb=["weight", "norm"])
    net[7].weight.requires_grad_(False)  # frozen by the user: it stays so
    names, received = {p: n for n, p in net.named_parameters()}, set()
    for p in names:
        if p.requires_grad:
            p.register_hook(lambda grad, p=p: received.add(names[p]))
    with minimizer.ascent():
        loss_of(net, batch(net)).backward()
    latent = set() if case == 3 else {"0.weight", "3.weight"}
    cheap = {"1.weight", "1.bias", "3.bias", "4.weight", "4.bias", "7.bias"}
    assert received == latent | cheap
    assert [n for p, n in names.items() if not p.requires_grad] == ["7.weight"]
    received.clear()
    with minimizer.perturbed():
        loss_of(net, batch(net)).backward()
    assert received == set(names.values()) - {"7.weight"}


def test_an_exception_switches_gradients_on_again():
    net = quantized(conv_net)
    with pytest.raises(KeyboardInterrupt):
        with SharpnessAwareMinimizer(net, rho=0.3).ascent():
            assert not net[0].weight.requires_grad and not net[0].activation_quantizer.scale.requires_grad
            raise KeyboardInterrupt
    assert all(p.requires_grad for p in net.parameters())


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that came to life inside of it and are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.alive:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_eps_is_the_only_buffer_of_the_size_of_the_weights(adaptive):
    """Peak of a step in case 3 against that of plain training, on a model whose memory is its weights."""
    sizes, layers = 256, 8
    net = nn.Sequential(*[nn.Linear(sizes, sizes, bias=False) for _ in range(layers)])
    quantize(net, SAQQuantizationConfig(weight_bits=4, activation_bits=None))
    weights = layers * sizes * sizes * 4
    x = torch.randn(2, sizes)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3, adaptive=adaptive)
    peaks = []
    for step in (lambda: net(x).square().mean().backward(), lambda: two_passes_on_squares(net, minimizer, x)):
        net.zero_grad()
        with PeakMemory() as memory:
            step()
        peaks.append(memory.peak / weights)
        assert memory.peak > weights  # at least the gradients are seen
    assert peaks[1] < peaks[0] + 1.1


def two_passes_on_squares(net, minimizer, x) -> None:
    for context in (minimizer.ascent, minimizer.perturbed):
        with context():
            net(x).square().mean().backward()


class TwoBiases(nn.Module):
    """Autograd hands one and the same tensor to both biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)
        self.a_bias, self.b_bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.linear(x) + (self.a_bias + self.b_bias)


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_pass_is_an_ordinary_one_and_a_first_pass_at_once(case):
    """Over two micro-batches: gradients as without it, and the `eps` that `ascent` would have made."""
    net, plain, other = TwoBiases(), TwoBiases(), TwoBiases()
    for model in (net, plain, other):
        quantize(model, SAQQuantizationConfig(weight_bits=4, activation_bits=None))
    minimizer, ascending = (SharpnessAwareMinimizer(m, rho=0.3, case=case) for m in (net, other))
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        data = torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        with minimizer.recorded():
            loss_of(net, data).backward()
        with ascending.ascent():
            loss_of(other, data).backward()
        loss_of(plain, data).backward()
    eps, expected = minimizer.climb(), ascending.climb()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    found, expected = eps.named(net), expected.named(other)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-8, rtol=1e-6, msg=name)


def test_displaced_is_the_perturbed_point_and_leaves_no_trace():
    net = quantized(linear_net)
    minimizer, data = SharpnessAwareMinimizer(net, rho=0.3), batch(net)
    with minimizer.ascent():
        loss_of(net, data).backward()
    with minimizer.perturbed() as eps:
        expected = loss_of(net, data)
    before = state_of(net)
    with minimizer.displaced(eps):
        assert torch.equal(loss_of(net, data), expected)
    assert_same_state(net, before)
    again = type(eps).from_named(eps.named(net), net)  # as a checkpoint keeps it
    with pytest.raises(KeyboardInterrupt):
        with minimizer.displaced(again):
            assert torch.equal(loss_of(net, data), expected)
            raise KeyboardInterrupt
    assert_same_state(net, before)
    assert not torch.equal(loss_of(net, data), expected)
