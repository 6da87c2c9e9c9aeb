"""What only a GPU can show; everything else runs on it by JACFUNC_TEST_DEVICE=cuda."""

import pytest
import torch
from torch import nn

import jacfunc

pytestmark = pytest.mark.cuda
STRATEGIES = ["reverse", "forward", "looped"]


def network(device):
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)
    return nn.Sequential(*layers).double().to(device)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_answer_is_that_of_the_cpu(strategy, per_sample, device):
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)

    def compute(where):
        jac = jacfunc.module_jacobian(
            network(where), ("params", "inputs"), per_sample=per_sample, strategy=strategy
        )(x.to(where))
        return [*jac[0].values(), jac[1]]

    for ours, expected in zip(compute(device), compute("cpu"), strict=True):
        assert ours.device.type == "cuda"
        torch.testing.assert_close(ours.cpu(), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_on_the_gpu_has_one_mask_and_leaves_its_generator(strategy, device):
    x = torch.ones(50, device=device)
    torch.cuda.manual_seed(7)
    expected = torch.diag(nn.functional.dropout(x, 0.5))
    torch.cuda.manual_seed(7)
    chunk_size = None if strategy == "looped" else 7
    jac = jacfunc.jacobian(
        lambda x: nn.functional.dropout(x, 0.5), strategy=strategy, chunk_size=chunk_size
    )(x)
    torch.testing.assert_close(jac, expected)
    before = torch.cuda.get_rng_state()
    jacfunc.module_jacobian(nn.Sequential(nn.Linear(2, 2), nn.Dropout()).to(device))(x[:2])
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("strategy", ["reverse", "forward"])
def test_a_full_gpu_halves_the_chunk(strategy, device, caplog):
    def func(x):
        return torch.tanh(torch.cat([x, x.flip(0)]))

    x = torch.randn(4096, device=device)
    expected = jacfunc.jacobian(func, strategy=strategy, chunk_size=64)(x)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    taken = total - free + 3 * expected.numel() * expected.element_size()
    torch.cuda.set_per_process_memory_fraction(taken / total)
    try:
        with caplog.at_level("INFO", "jacfunc"):
            jac = jacfunc.jacobian(func, strategy=strategy)(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with" in caplog.text
    torch.testing.assert_close(jac, expected)
