"""jacfunc: Jacobians, Hessians and per-sample derivatives for PyTorch.

Functions of trees: ``jacobian``, ``jacrev``, ``jacfwd``, ``hessian``, ``jvp``, ``vjp``, ``hvp``,
``vmap``. Traces of Hessians and Jacobians: ``laplacian``, ``hessian_diagonal``, ``divergence``.
Tensors with a graph: ``graph_jacobian``.
Operators, for products alone: ``linearize``, ``hessian_operator``, and ``jacfunc.operators``.
Modules: ``module_jacobian``, ``stream_jacobian``; without the Jacobian ``ntk``, ``ggn`` and others.
Costs: ``estimate``, ``plan``, ``explain``. Checks: ``jacfunc.testing``.
"""

from jacfunc._assembly import empty_cache
from jacfunc._compiled import Compiled, compile
from jacfunc._curvature import GaussNewton, fisher, ggn, gradient_norms, random_projection
from jacfunc._forecasting import Compilation
from jacfunc._functions import (
    Estimate,
    Explanation,
    estimate,
    explain,
    graph_jacobian,
    hessian,
    hvp,
    jacfwd,
    jacobian,
    jacrev,
    jvp,
    plan,
    value_and_jacobian,
    vjp,
    vmap,
)
from jacfunc._kernels import gram, ntk
from jacfunc._module_operators import module_hessian, module_operator
from jacfunc._modules import ModuleResult, module_jacobian, param_slices
from jacfunc._outputs import Sampled, TopK
from jacfunc._planning import Autotune, Plan
from jacfunc._streams import stream_jacobian
from jacfunc.operators import (
    LinearOperator,
    divergence,
    hessian_diagonal,
    hessian_operator,
    laplacian,
    linearize,
    value_jacobian_laplacian,
)
from jacfunc.strategies import Forward, Looped, Reverse, Strategy, Structured

__all__ = [
    "Autotune",
    "Compilation",
    "Compiled",
    "Estimate",
    "Explanation",
    "Forward",
    "GaussNewton",
    "LinearOperator",
    "Looped",
    "ModuleResult",
    "Plan",
    "Reverse",
    "Sampled",
    "Strategy",
    "Structured",
    "TopK",
    "compile",
    "divergence",
    "empty_cache",
    "estimate",
    "explain",
    "fisher",
    "ggn",
    "gradient_norms",
    "gram",
    "graph_jacobian",
    "hessian",
    "hessian_diagonal",
    "hessian_operator",
    "hvp",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jvp",
    "laplacian",
    "linearize",
    "module_hessian",
    "module_jacobian",
    "module_operator",
    "ntk",
    "param_slices",
    "plan",
    "random_projection",
    "stream_jacobian",
    "value_and_jacobian",
    "value_jacobian_laplacian",
    "vjp",
    "vmap",
]
__version__ = "0.1.0"
