"""A call of a module with other tensors in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(module: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """``module(*args)`` with ``values`` in the place of its own tensors, which stay as they are.

    Args:
        module: called.
        values: by the names of ``named_parameters()`` and ``named_buffers()``, where a tensor that
            stands in several places has one name; it is replaced in all of them.
        args: of the call.

    ``torch.func.functional_call`` ties by all names that a tensor has; where a submodule is used
    twice, two of them are one place, and it leaves the values there. Here each place is named once.
    """
    places: dict[int, list[str]] = {}
    for prefix, submodule in module.named_modules():  # each once
        for own in (submodule.named_parameters, submodule.named_buffers):
            for name, tensor in own(prefix, recurse=False, remove_duplicate=False):
                places.setdefault(id(tensor), []).append(name)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    everything = {
        place: value for name, value in values.items() for place in places[id(named[name])]
    }
    return torch.func.functional_call(module, everything, args, tie_weights=False)
