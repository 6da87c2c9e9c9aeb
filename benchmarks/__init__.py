"""Times jacfunc against its rivals, on answers that were checked first."""
