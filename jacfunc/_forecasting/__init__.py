"""What a strategy would cost, in seconds and bytes, before it runs."""

from jacfunc._forecasting.call_forecast import CallForecast
from jacfunc._forecasting.compilation import Compilation, price_in_words
from jacfunc._forecasting.costs import Costs, counted_costs
from jacfunc._forecasting.machines import known_machine
from jacfunc._forecasting.on_fakes import Forecast
