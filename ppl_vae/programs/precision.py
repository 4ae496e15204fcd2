"""Products of networks in a lower precision, with everything around them as it is."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

Precision = Literal["full", "bfloat16"]
LEAST = 2**21  # multiplications, from which on a product repays the rounding of its factors
_LAYERS: set[Any] = {linear, torch.conv1d, torch.conv2d, torch.conv3d}
_LAYERS |= {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}


class Lowered(TorchFunctionMode):
    """Runs the linear layers and convolutions within, those of PyTorch's modules and functions, in bfloat16.

    Inputs, weights and biases are rounded, and so are the gradients that come back through them; what they give is in
    single precision again. So densities, losses, parameters and their gradients are. Small products and those of
    other functions, such as the products of densities, stay as they are.

    Attributes:
        used: whether anything was rounded.
    """

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LAYERS and _is_large(*[one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)][:2]):
            self.used = True
            kwargs = {key: _rounded(value) for key, value in kwargs.items()}
            return func(*map(_rounded, args), **kwargs).float()
        return func(*args, **kwargs)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether a product in single precision has about `LEAST` multiplications or more."""
    single = x.dtype == weight.dtype == torch.float32
    return single and weight.numel() > 0 and x.numel() * weight.numel() // weight.shape[1] >= LEAST


def _rounded(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) else value
