"""Calls of which nothing is left to learn but the numbers: evaluated again, and swept at once."""

from jacfunc._settled.batch import SettledBatch
from jacfunc._settled.known_products import KnownProducts, lent_again, pulled, pushed
from jacfunc._settled.products import ProductsAgain
from jacfunc._settled.repeated import blocks_of, matrix_of
from jacfunc._settled.settling import by_door, by_layers, kept, settled_by, takes_second
from jacfunc._settled.sweeps import Beside, Work
from jacfunc._settled.under_vmap import SettledSamples
