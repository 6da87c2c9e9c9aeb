"""Calls of which nothing is left to learn but the numbers: evaluated again, and swept at once."""

from jacfunc._settled.batch import MOST_MISSES, SettledBatch, no_seeds
from jacfunc._settled.sweeps import SeedsOf, Work
from jacfunc._settled.under_vmap import SettledSamples
