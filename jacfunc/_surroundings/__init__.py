"""All that a function refers to, and whether it has changed."""

from jacfunc._surroundings.layers import LayerCode
from jacfunc._surroundings.surroundings import Surroundings
from jacfunc._surroundings.things import is_value, value_of
