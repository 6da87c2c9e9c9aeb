"""Chooses the strategy that runs and its chunks, and says why."""

import jacfunc._planning.old_pickles  # it names modules that are no more, for pickles
from jacfunc._planning.auto import Auto, pulls_all_rows
from jacfunc._planning.autotune import Autotune
from jacfunc._planning.budget import BUDGET_SHARE, bounded
from jacfunc._planning.by_name import compilable, directed, resolve, resolve_second
from jacfunc._planning.choice import SampledWays
from jacfunc._planning.plan import UNMAPPED, Plan, attempt
from jacfunc._planning.recall import by_memory, by_second, has_near_second, recall, remember
from jacfunc._planning.second import HESSIAN_PRODUCT, HESSIAN_PRODUCTS
