"""The outputs that are asked for: rows of a Jacobian, as a linear map behind the function."""

from jacfunc._outputs.by_value import Sampled, TopK
from jacfunc._outputs.call import Asked, ChosenCall, ChosenOutputs
from jacfunc._outputs.options import Outputs, choice_of, of_many
