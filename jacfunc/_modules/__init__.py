"""The doors for ``nn.Module``: Jacobians of a module, whole, per sample or block by block."""

from jacfunc._modules.at_batch import BatchOptions, BatchOutputs, ModuleAtBatch
from jacfunc._modules.call import ModuleCall, Wrt, argnums_of
from jacfunc._modules.independence import Independence, Independent, now_and_then
from jacfunc._modules.jacobian import ModuleResult, module_jacobian, param_slices
from jacfunc._modules.options import Batching, check_randomness_option
from jacfunc._modules.stream import stream_jacobian
