"""Products ``J Jᵀ``, without the Jacobian."""

from jacfunc._kernels.ntk import gram, ntk
