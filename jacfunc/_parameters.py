"""The tensors that a module is called with, by name: names are strict, tied tensors count once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn


@dataclass(frozen=True)
class ModuleState:
    """Parameters and buffers of a module: those that are differentiated, and the constants."""

    chosen: dict[str, Tensor]
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    aliases: dict[str, str]  # further names of tied tensors, and the first name of each

    @classmethod
    def of(cls, api: str, module: nn.Module, select: str | Sequence[str] | None) -> ModuleState:
        aliases: dict[str, str] = {}
        params = _untied(module.named_parameters(remove_duplicate=False), aliases)
        buffers = _untied(module.named_buffers(remove_duplicate=False), aliases)
        chosen = {name: params.pop(name) for name in _chosen(api, params, select)}
        return cls(chosen, params, buffers, aliases)

    def tensors(self, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor under all its names, with the chosen ones given anew."""
        tensors = {name: param.detach() for name, param in self.params.items()}
        # in train mode a module writes into its buffers
        tensors |= {name: buffer.clone() for name, buffer in self.buffers.items()}
        tensors |= chosen
        return tensors | {name: tensors[first] for name, first in self.aliases.items()}


def _untied(named: Iterable[tuple[str, Tensor]], aliases: dict[str, str]) -> dict[str, Tensor]:
    """Each tensor under the first of its names; the others go to the aliases."""
    first: dict[Tensor, str] = {}
    for name, tensor in named:
        if first.setdefault(tensor, name) != name:
            aliases[name] = first[tensor]
    return {name: tensor for tensor, name in first.items()}


def _chosen(
    api: str, params: Mapping[str, Tensor], select: str | Sequence[str] | None
) -> list[str]:
    """Names of the trainable parameters that the patterns match, in the module's order."""
    trainable = [name for name, param in params.items() if param.requires_grad]
    if select is None:
        return trainable
    patterns = [select] if isinstance(select, str) else list(select)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            near = difflib.get_close_matches(pattern, params, n=3) or list(params)[:3]
            raise ValueError(
                f"{api}: select must match trainable parameters, got {pattern!r}. "
                f"Nearest names: {', '.join(near)}."
            )
    return [name for name in trainable if any(fnmatchcase(name, p) for p in patterns)]
