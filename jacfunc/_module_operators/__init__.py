"""Linear operators of modules: their Jacobians at a batch, or at all batches of a data loader."""

from jacfunc._module_operators.hessian import module_hessian
from jacfunc._module_operators.operator import module_operator
