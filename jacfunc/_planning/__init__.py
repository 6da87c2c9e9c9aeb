"""Which strategy runs, in which chunks, and why."""

from jacfunc._planning.auto import Auto
from jacfunc._planning.autotune import Autotune
from jacfunc._planning.budget import SHARE
from jacfunc._planning.by_name import directed, resolve
from jacfunc._planning.choice import SampledWays
from jacfunc._planning.old_pickles import load_old_pickles
from jacfunc._planning.plan import UNMAPPED, Plan, attempt
from jacfunc._planning.recall import recall, remember

load_old_pickles()
