"""What a module does with samples, as trials tell: where outputs hold them, what they change."""

from jacfunc._trials.trials import (
    IN_FRONT,
    BatchOutputs,
    OutputDims,
    Trials,
    batch_norms,
    of_one,
    subject_of,
)
