"""The samples of a batch: how they are evaluated, whether they are independent, and written."""

from jacfunc._samples.call import SampledCall
from jacfunc._samples.comparing import Coupling, GradientOf, Subject, loss_coupling
from jacfunc._samples.coupling import coupling
from jacfunc._samples.halves import at, groups_of, has_batch
from jacfunc._samples.one import (
    ALONE_ROUNDING,
    SAME_EACH_TIME,
    FirstSamples,
    OneSample,
    SampleBlocks,
    first_again,
)
from jacfunc._samples.writing import SampleWriter, is_new
