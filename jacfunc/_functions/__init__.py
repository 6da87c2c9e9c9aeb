"""The public functions that differentiate functions of trees."""

from jacfunc._functions.estimate import Estimate, estimate
from jacfunc._functions.explain import Explanation, explain, plan
from jacfunc._functions.graph import graph_jacobian
from jacfunc._functions.hessian import hessian, value_and_jacobian
from jacfunc._functions.products import hvp, jvp, vjp
from jacfunc._functions.transforms import jacfwd, jacobian, jacrev
from jacfunc._functions.vmap import vmap
