"""Products ``J Jᵀ``, without the Jacobian."""

from jacfunc._kernels.gram import Axes, Gram
from jacfunc._kernels.ntk import gram, ntk
