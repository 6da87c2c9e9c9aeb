"""Measured by commands of their own: what jacfunc's choices, budgets and Python cost."""
