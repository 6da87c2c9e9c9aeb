"""Where the tensors of a batch hold its samples, if the batch is evaluated as a whole.

The shapes in a batch of another size tell in which dimension. Where that dimension holds more than
the samples, their order is told by the numbers: those in the other batch, and cotangents that are
zero for some of the samples.
"""

from jacfunc._layouts.evidence import ROUNDING, Evidence
from jacfunc._layouts.layouts import OUT, Key, Layout, NoLayout, Sites, Unlike
from jacfunc._layouts.mixing import Mixing
from jacfunc._layouts.placing import Placing, PlainSamples, VmappedSamples
from jacfunc._layouts.recording import (
    FEWEST_PULLED,
    KIND,
    Args,
    OperationRecorder,
    begins,
    ends,
)
from jacfunc._layouts.stepwise import copy_written, may_mix, mixes_unseen
from jacfunc._layouts.telling import READING, TELLING, VALUES, are_among, tensors_in
from jacfunc._layouts.traces import Trace, WhatWasSeen
