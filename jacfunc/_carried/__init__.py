"""Second derivatives carried forward, written down: what a function does is compared."""

from jacfunc._carried.calls import in_batches, with_settled_calls
