"""Products with a Jacobian and its transpose at a point, on a graph that is kept."""

from jacfunc._products.factored import FactoredProducts, from_factors, takes_factors
from jacfunc._products.point import NOT_TRANSPOSED, PointProducts, Way
