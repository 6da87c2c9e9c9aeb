"""What tests inside ``torch.compile`` have in common."""

import pytest

# torch's own warnings, of caches of functions and of graphs that it traces
INSIDE_COMPILER = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.usefixtures("fresh_compiler"),
]
