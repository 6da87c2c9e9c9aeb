"""The doors for ``nn.Module``: Jacobians of a module, whole or per sample."""

from jacfunc._modules.at_batch import BatchOptions, ModuleAtBatch
from jacfunc._modules.call import ModuleCall
from jacfunc._modules.function import FunctionAsModule, as_tree, check_called, tangents_of
from jacfunc._modules.independence import FEW_CALLS, Independence, Independent, now_and_then
from jacfunc._modules.independent import ModuleResult
from jacfunc._modules.inputs import InputChoice, Key, Wrt, argnums_of
from jacfunc._modules.jacobian import module_jacobian, param_slices
from jacfunc._modules.options import (
    Batching,
    ModuleOptions,
    RowOptions,
    SampleOptions,
    batching_of,
    check_randomness_option,
)
from jacfunc._modules.settled import made_at_once
