"""Who takes a step of stochastic reconfiguration: ``Jcᵀ (Jc Jcᵀ + λ)⁻¹ ε`` with a centred J."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import jacfunc
from benchmarks.contestants.by_hand import FACTORS
from benchmarks.problems.judge import Answer
from benchmarks.problems.wavefunction import STEP, Sampled
from jacfunc._measuring import Contestant, Run

OURS, RECIPE = "jacfunc", "vmap(grad), J and a solve"


def by_jacfunc(problem: Sampled) -> Run:
    operator_of = jacfunc.module_operator(problem.model, per_sample=True)
    energies, damping = problem.energies, problem.damping

    def run() -> Answer:
        operator = operator_of(problem.positions)
        step = operator.lstsq(energies, damping=damping, center=True)
        return {STEP: step}

    return run


def by_recipe(problem: Sampled) -> Run:
    """J by the recipe of every tutorial, centred, and one product."""
    model, positions = problem.model, problem.positions
    params = {name: param.detach() for name, param in model.named_parameters()}

    def value(params: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, params, (x[None],))
        return out[0, 0]

    gradients = vmap(grad(value), (None, 0))

    def run() -> Answer:
        matrix = torch.cat([g.flatten(1) for g in gradients(params, positions).values()], 1)
        matrix -= matrix.mean(0)
        kernel = matrix @ matrix.T
        kernel.diagonal().add_(problem.damping)
        return {STEP: matrix.T @ torch.linalg.solve(kernel, problem.energies)}

    return run


def by_hand(problem: Sampled) -> Run:
    """From what goes into layers and what comes back to them, added up in float64."""
    layers = list(problem.model.children())

    def run() -> Answer:
        seen, outs, x = [], [], problem.positions
        for layer in layers:
            before, x = x, layer(x)
            if isinstance(layer, nn.Linear):
                seen.append(before.detach())
                outs.append(x)
        backs = torch.autograd.grad(x.sum(), outs)
        kernel = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
        for inputs, back in zip(seen, backs, strict=True):
            a, g = inputs.double(), back.double()
            kernel.addcmul_(a @ a.T + 1, g @ g.T)
        kernel -= kernel.mean(0)
        kernel -= kernel.mean(1, keepdim=True)
        kernel.diagonal().add_(problem.damping)
        factor = torch.linalg.cholesky(kernel)
        weights = torch.cholesky_solve(problem.energies.double()[:, None], factor)
        weights = (weights - weights.mean()).float()
        step = []
        for inputs, back in zip(seen, backs, strict=True):
            weighted = weights * back
            step += [weighted.T @ inputs, weighted.sum(0)]
        return {STEP: torch.cat([part.flatten() for part in step])}

    return run


MINSR: tuple[Contestant[Sampled], ...] = (
    Contestant(OURS, "jacfunc", by_jacfunc),
    Contestant(RECIPE, "torch.func", by_recipe),
    Contestant(FACTORS, "autograd", by_hand),
)
