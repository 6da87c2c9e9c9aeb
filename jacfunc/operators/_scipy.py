"""Linear operators beside NumPy, SciPy and torch, which know their own arrays alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jacfunc._types import RowMap


class BesideArrays:
    """An object that stands beside arrays and tensors in ``2.0 * A`` and ``u @ A``."""

    __array_ufunc__ = None
    """NumPy's arrays and numbers leave it to the object."""

    @classmethod
    def __torch_function__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave it to the object, too; torch.compile takes ``A @ v`` for ``v @ A``.

        Raises:
            NotImplementedError: inside torch.compile.
        """
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{cls.__name__}: inside torch.compile products must be taken by methods, got an "
                "operator such as @ beside a tensor. Write J.mv(v), J.rmv(u), J.mm(V)."
            )
        return NotImplemented


def scipy_operator(shape: tuple[int, int], dtype: torch.dtype, push: RowMap, pull: RowMap) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` of these products.

    NumPy has no bfloat16, and SciPy's solvers no half precision: these are float32 for it.
    """
    from scipy.sparse.linalg import LinearOperator as SciPyOperator

    theirs = torch.promote_types(dtype, torch.float32)

    def on_arrays(products_of: RowMap) -> Callable[[Any], Any]:
        def products(columns: Any) -> Any:
            # SciPy may pass arrays that can't be written into, or that lie backwards
            rows = torch.from_numpy(columns.reshape(len(columns), -1).T.copy()).to(dtype)
            with torch.no_grad():
                result = products_of(rows).to("cpu", theirs).numpy().T
            return result[:, 0] if columns.ndim == 1 else result

        return products

    matvec, rmatvec = on_arrays(push), on_arrays(pull)
    name = str(theirs).removeprefix("torch.")
    return SciPyOperator(shape, matvec, rmatvec, matvec, dtype=name, rmatmat=rmatvec)
