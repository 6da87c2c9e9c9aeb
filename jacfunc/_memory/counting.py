"""Counts the memory that tensors take, for forecasts and for benchmarks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """A mode that does not load torch's compiler.

    Torch's own modes load it at the first operation, to say that they are not to be compiled: that
    takes a second and 75 MB of the process's first call. Where it is not loaded, nothing is
    compiled.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        own = vars(cls).get("__torch_dispatch__")
        super().__init_subclass__(**kwargs)
        if own is not None:
            cls.__torch_dispatch__ = _uncompiled(own, cls.__torch_dispatch__)  # type: ignore[method-assign]


def _uncompiled(own: Callable[..., Any], by_torch: Callable[..., Any]) -> Callable[..., Any]:
    """A mode's handler; torch's wrapper of it once the compiler is there."""

    @wraps(own)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        is_loaded = hasattr(sys.modules.get("torch._dynamo"), "disable")
        return (by_torch if is_loaded else own)(*args, **kwargs)

    return dispatch


class PeakBytes(DispatchMode):
    """Peak bytes of the tensors made inside the ``with`` block, above what lived before.

    It sees every operation below autograd and the functorch transforms, so backward passes and
    vmapped calls count by their physical tensors. A storage counts once, however many views it
    has, from the operation that makes it until it is freed. Scratch memory that a kernel takes
    and gives back on its own is not seen.

    Example:
        >>> import torch
        >>> from jacfunc._memory import PeakBytes
        >>> with PeakBytes() as counter:
        ...     a = torch.empty(1000)
        ...     del a
        ...     b = torch.empty(500)
        >>> counter.peak, counter.live
        (4000, 2000)
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if getattr(func, "is_view", False):
            return outputs
        before = {storage._cdata for storage in _storages((*args, *kwargs.values()))}
        for storage in _storages((outputs,)):
            # a view or an in-place result of a tensor from outside takes nothing new
            if storage._cdata in self._sizes or storage._cdata not in before:
                self.count(storage)
        return outputs

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage that no operation made, or the bytes that a known one has grown by."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key).atexit = False
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def dense_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The strided tensors among arguments or results, and in the lists that these hold.

    Tensors of other layouts have no storage: their parts are counted where they are made.
    """
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from dense_tensors(value)
        elif isinstance(value, Tensor) and value.layout == torch.strided:
            yield value


def _storages(values: Iterable[Any]) -> list[torch.UntypedStorage]:
    """The storages of tensors, but for forward mode's zeros, which have no memory."""
    with torch._C.DisableTorchFunction():  # or it would count as a read by the user's function
        return [x.untyped_storage() for x in dense_tensors(values) if not x._is_zerotensor()]
