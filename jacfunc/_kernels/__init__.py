"""Neural tangent kernels and Gramians ``J Jᵀ``, without writing out J."""

from jacfunc._kernels.kept import KeptRows
from jacfunc._kernels.ntk import gram, ntk
from jacfunc._kernels.samples import gram_of_samples, variances_of_samples
