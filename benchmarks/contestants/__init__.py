"""Who takes part: the ways of jacfunc, of torch, and of other libraries."""
