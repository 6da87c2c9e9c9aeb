"""Tests of jacfunc: one table of problems, independent oracles, and laws."""
