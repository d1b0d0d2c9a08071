"""Computing in double precision where the host and the pack ask for single precision."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class DoublePrecision(TorchFunctionMode):
    """While it is active, every conversion to float32 makes float64, and random numbers of float32 become float64.

    Hosts compute rotary embeddings, norms and a model's output in float32, whatever its weights are. Finite
    differences along one row of a thousand then drown in rounding.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch with another dtype."""
        arguments, options = tree_map(
            lambda value: torch.float64 if value is torch.float32 else value, (arguments, options or {})
        )
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        result = function(*arguments, **options)
        return result.double() if function is torch.randn else result
