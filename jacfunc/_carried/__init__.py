"""Second derivatives that are carried forward, written down: a function's operations are compared."""

from jacfunc._carried.calls import in_batches, with_settled_calls
