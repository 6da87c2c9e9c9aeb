"""Jacobians of whole modules, against a looped reference of parameters and inputs."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import jacfunc


class Twice(nn.Module):
    """Tied weights, a frozen parameter, one module called twice, and a raw parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.tied = self.first
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.tied(torch.tanh(self.frozen(self.first(x)))) * self.scale


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.outer = nn.Linear(5, 3)

    def forward(self, x):
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


class LastOfGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 3, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (3, 4)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        ),
        (3, 1, 6, 6),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
        (3, 4),
    ),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval(), (3, 4)),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.ELU()), (3, 4)),
    "twice": (Twice, (3, 4)),
    "attention": (Attention, (3, 5, 4)),
    "checkpoint": (Checkpointed, (3, 4)),
    "gru": (LastOfGRU, (3, 5, 4)),
}
# what torch has no batching rule over samples for
NO_VMAP = {"gru"}


def case(name):
    torch.manual_seed(0)
    make, shape = MODULES[name]
    return make().double(), torch.randn(shape, dtype=torch.float64)


def reference(module, x):
    """``(by name [*out, *param], [*out, *in])`` by one backward pass an output."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    out = module(x)
    rows = [
        torch.autograd.grad(e, [x, *params.values()], retain_graph=True, materialize_grads=True)
        for e in out.reshape(-1)
    ]
    by_leaf = [
        torch.stack(leaf).view(out.shape + leaf[0].shape) for leaf in zip(*rows, strict=True)
    ]
    return dict(zip(params, by_leaf[1:], strict=True)), by_leaf[0]


def per_sample_reference(module, x):
    singles = [reference(module, row.unsqueeze(0)) for row in x]
    params = {
        name: torch.stack([single[0][name].squeeze(0) for single in singles])
        for name in singles[0][0]
    }
    inputs = [single[1].squeeze(0).squeeze(single[1].dim() - x.dim() - 1) for single in singles]
    return params, torch.stack(inputs)


CASES = [
    pytest.param(name, strategy, id=f"{name}-{strategy}")
    for name in MODULES
    for strategy in ("auto", "reverse", "looped", "forward")
]
PER_SAMPLE_CASES = [
    case for case in CASES if case.values[0] not in NO_VMAP or case.values[1] != "forward"
]


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_whole_batch(name, strategy):
    module, x = case(name)
    params, inputs = reference(module, x)
    jac = jacfunc.module_jacobian(module, ("params", "inputs"), strategy=strategy)(x)
    assert list(jac[0]) == list(params)
    torch.testing.assert_close(jac[0], params)
    torch.testing.assert_close(jac[1], inputs)
    assert not any(block.requires_grad for block in jac[0].values())


@pytest.mark.parametrize(("name", "strategy"), PER_SAMPLE_CASES)
def test_per_sample(name, strategy):
    module, x = case(name)
    params, inputs = per_sample_reference(module, x)
    jac = jacfunc.module_jacobian(module, ("params", "inputs"), per_sample=True, strategy=strategy)(
        x
    )
    torch.testing.assert_close(jac[0], params)
    torch.testing.assert_close(jac[1], inputs)


@pytest.mark.parametrize("name", sorted(NO_VMAP))
def test_what_vmap_cannot_batch_is_taken_as_a_batch_or_looped(name):
    module, x = case(name)
    params, _ = per_sample_reference(module, x)
    for strategy in ("looped", "reverse", "auto"):
        jac = jacfunc.module_jacobian(module, per_sample=True, strategy=strategy)(x)
        torch.testing.assert_close(jac, params)


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_fused_attention_is_taken_apart_and_left_as_it_was(strategy, mode):
    torch.manual_seed(0)
    module = encoder().double().train(mode == "train")
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    params, inputs = reference(module, x)
    compute = jacfunc.module_jacobian(module, ("params", "inputs"), strategy=strategy)
    jac = compute(x)
    torch.testing.assert_close(jac[0], params)
    torch.testing.assert_close(jac[1], inputs)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("strategy", ["reverse", "forward"])
def test_hessians_through_attention(strategy):
    torch.manual_seed(0)
    module = encoder().double().requires_grad_(False)
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    step = 1e-6 * torch.randn_like(x)

    def gradient(x):
        return jacfunc.jacrev(lambda x: module(x).square().sum())(x)

    hessian = jacfunc.hessian(lambda x: module(x).square().sum(), strategy=strategy)(x)
    slope = (gradient(x + step) - gradient(x - step)) / 2
    pushed = torch.einsum("abcdef,def->abc", hessian, step)
    torch.testing.assert_close(pushed, slope, rtol=1e-5, atol=1e-13)


def test_names_are_strict_and_globs_select():
    module, x = case("mlp")
    params, _ = reference(module, x)
    jac = jacfunc.module_jacobian(module, select="*.weight")(x)
    torch.testing.assert_close(jac, {n: params[n] for n in ("0.weight", "2.weight")})
    jac = jacfunc.module_jacobian(module, select=["2.bias", "0.bias"])(x)
    assert list(jac) == ["0.bias", "2.bias"]
    with pytest.raises(ValueError, match=r"got '0\.wieght'\. Nearest names: 0\.weight"):
        jacfunc.module_jacobian(module, select="0.wieght")(x)


def test_frozen_parameters_are_constants():
    module, x = case("twice")
    assert "frozen.weight" not in jacfunc.module_jacobian(module)(x)
    with pytest.raises(ValueError, match=r"must match trainable parameters, got .frozen\.weight."):
        jacfunc.module_jacobian(module, select="frozen.weight")(x)


def test_create_graph_keeps_the_result_differentiable():
    module, x = case("mlp")
    jac = jacfunc.module_jacobian(module, "inputs", per_sample=True, create_graph=True)(x)
    loss = jac.square().sum()
    loss.backward()
    weight = module[0].weight
    step = 1e-6 * torch.randn_like(weight)

    def penalty(shift):
        with torch.no_grad():
            weight.add_(shift)
            value = jacfunc.module_jacobian(module, "inputs", per_sample=True)(x).square().sum()
            weight.sub_(shift)
        return value

    slope = (penalty(step) - penalty(-step)) / 2
    torch.testing.assert_close((weight.grad * step).sum(), slope, rtol=1e-5, atol=1e-12)


def test_a_detached_jacobian_inside_another_derivative_is_refused():
    module, x = case("mlp")
    with pytest.raises(ValueError, match="Pass create_graph=True"):
        torch.func.grad(lambda x: jacfunc.module_jacobian(module, "inputs")(x).sum())(x)
    torch.func.grad(
        lambda x: jacfunc.module_jacobian(module, "inputs", create_graph=True)(x).sum()
    )(x)


class Moody(nn.Module):
    """Has every kind of state: buffers, dropout, hooks, a flag; and can fail midway."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(()))
        self.fails = False
        self.body.register_forward_hook(lambda *_: None)

    def forward(self, x):
        self.calls += 1
        out = self.body(x)
        if self.fails:
            raise ArithmeticError("midway")
        return out


def snapshot(module):
    return (
        {name: value.clone() for name, value in module.state_dict().items()},
        {name: (p.requires_grad, p.grad, id(p)) for name, p in module.named_parameters()},
        {name: id(b) for name, b in module.named_buffers()},
        [part.training for part in module.modules()],
        [len(part._forward_hooks) for part in module.modules()],
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped"])
def test_the_module_is_left_as_it_was(fails, strategy):
    module = Moody().train()
    module.fails = fails
    before = snapshot(module)
    compute = jacfunc.module_jacobian(module, strategy=strategy)
    if fails:
        with pytest.raises(ArithmeticError, match="midway"):
            compute(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    else:
        compute(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    after = snapshot(module)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:5] == before[1:5]
    assert torch.equal(after[5], before[5])


def test_batch_norm_in_train_mode():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double().train()
    x = torch.randn(3, 4, dtype=torch.float64)
    params, _ = reference(module, x)
    for strategy in ("reverse", "forward", "looped"):
        jac = jacfunc.module_jacobian(module, strategy=strategy)(x)
        torch.testing.assert_close(jac, params)
    with pytest.raises(ValueError, match="batch normalization over the batch in 1"):
        jacfunc.module_jacobian(module, per_sample=True)(x)


def test_trees_and_keywords_as_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, ids, *, scale, offset=None):
            return {"logits": self.table(ids).sum(1) * scale, "ids": ids}

    net, ids, scale = Net(), torch.tensor([[0, 1], [2, 2]]), torch.tensor([[2.0], [3.0]])
    jac = jacfunc.module_jacobian(net, per_sample=True)(ids, scale=scale)
    assert jac["ids"] is None
    block = jac["logits"]["table.weight"]
    assert block.shape == (2, 3, 5, 3)
    torch.testing.assert_close(block[1, :, 2], 6 * torch.eye(3))
    whole = jacfunc.module_jacobian(net)(ids, scale=scale)["logits"]["table.weight"]
    torch.testing.assert_close(torch.stack([whole[0], whole[1]]), block)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: jacfunc.module_jacobian(torch.sin), TypeError, "module must be an nn.Module"),
        (
            lambda: jacfunc.module_jacobian(nn.Linear(2, 2), "weights"),
            ValueError,
            "wrt must be 'params', 'inputs' or a tuple of both, got 'weights'",
        ),
        (
            lambda: jacfunc.module_jacobian(nn.Bilinear(2, 2, 2), per_sample=True)(
                torch.ones(3, 2), torch.ones(4, 2)
            ),
            ValueError,
            "must have the same batch, got",
        ),
    ],
)
def test_messages(build, error, message):
    with pytest.raises(error, match=message):
        build()


class Keeps(nn.Module):
    """Writes into all that a module can hold beside parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.steps = torch.zeros(())
        self.history = [torch.ones(3)]
        self.by_name = {"weight": self.layer.weight}

    def forward(self, x):
        self.steps += 1
        self.history.append(self.layer(x))
        self.register_buffer("cache", self.history[-1])
        self.last = self.cache * self.steps
        return self.last @ self.by_name["weight"]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "reverse", "forward", "looped"])
def test_whatever_a_module_keeps_is_left_as_it_was(strategy, per_sample):
    torch.manual_seed(0)
    module, x = Keeps().double(), torch.randn(3, 4, dtype=torch.float64)
    find = per_sample_reference if per_sample else reference
    params, _ = find(module, x)
    before, steps, history = set(vars(module)), module.steps, module.history
    jac = jacfunc.module_jacobian(module, per_sample=per_sample, strategy=strategy)(x)
    torch.testing.assert_close(jac, params)
    assert set(vars(module)) == before
    assert module.steps is steps
    assert steps == 0
    assert module.history is history
    assert len(history) == 1
    assert not list(module.buffers())
    assert module.by_name["weight"] is module.layer.weight


def test_what_a_checkpoint_runs_again_writes_into_copies():
    class Net(Checkpointed):
        def __init__(self):
            super().__init__()
            self.inner.append(nn.BatchNorm1d(5))

    torch.manual_seed(0)
    module, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    before = snapshot(module)
    params, _ = reference(module, x)
    jac = jacfunc.module_jacobian(module, select="outer.*", strategy="looped")(x)
    torch.testing.assert_close(jac, {name: params[name] for name in jac})
    torch.testing.assert_close(snapshot(module)[0], before[0], rtol=0, atol=0)


def test_reentrant_checkpoints_are_refused_each_time():
    class Net(Checkpointed):
        def forward(self, x):
            return self.outer(checkpoint(self.inner, x, use_reentrant=True))

    module, x = Net(), torch.ones(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        filters = list(warnings.filters)
        with pytest.warns(UserWarning, match="None of the inputs"):
            module(x)
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="Pass use_reentrant=False"):
                jacfunc.module_jacobian(module, strategy="reverse")(x)
        assert warnings.filters == filters


def test_scripted_parts_are_constants():
    torch.manual_seed(0)
    inner = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double())
    module = nn.Sequential(inner, nn.Linear(4, 2).double())
    x = torch.randn(3, 4, dtype=torch.float64)
    before = snapshot(module)
    jac = jacfunc.module_jacobian(module, ("params", "inputs"), select="1.*")(x)
    torch.testing.assert_close(snapshot(module)[0], before[0], rtol=0, atol=0)
    assert snapshot(module)[1] == before[1]
    copied = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    copied.load_state_dict(inner.state_dict())
    params, inputs = reference(nn.Sequential(copied, module[1]), x)
    torch.testing.assert_close(jac, ({n: params[n] for n in ("1.weight", "1.bias")}, inputs))
    with pytest.raises(ValueError, match=r"got 0\.0\.weight of TorchScript\. Pass wrt='inputs'"):
        jacfunc.module_jacobian(module)(x)
    with pytest.raises(ValueError, match=r"over the batch in 0\.1"):
        jacfunc.module_jacobian(module, "inputs", per_sample=True)(x)


def test_frozen_torch_script_has_no_mode():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double().eval()
    frozen = torch.jit.freeze(torch.jit.script(module))
    x = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(3):
        jac = jacfunc.module_jacobian(frozen, "inputs", per_sample=True)(x)
        expected = jacfunc.module_jacobian(module, "inputs", per_sample=True, strategy="looped")(x)
        torch.testing.assert_close(jac, expected)


def test_modules_with_the_batch_behind_have_no_samples():
    with pytest.raises(ValueError, match="got batch_first=False"):
        jacfunc.module_jacobian(nn.GRU(4, 2), per_sample=True)(torch.ones(3, 5, 4))
