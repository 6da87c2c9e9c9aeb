"""``python -m jacfunc compare my_module:make_problem``: which strategy, for my model?"""

from __future__ import annotations

import sys

from jacfunc.compare import main

if __name__ == "__main__":
    sys.exit(main())
