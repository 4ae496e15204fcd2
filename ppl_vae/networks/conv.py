"""Convolutional networks: encoders and decoders of pictures."""

import math
from abc import abstractmethod
from itertools import pairwise

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_int
from ppl_vae.networks.mlp import ACTIVATIONS, Activation, Residual
from ppl_vae.networks.network import Amortized

_AT_ONCE = 256  # pictures, without gradients on a CPU: many more would leave its cache


class Picture(Amortized):
    """An encoder or a decoder of pictures, by the size of its context. A subclass writes what follows a convolution.

    Args:
        shape: The picture's shape, (height, width) or (channels, height, width).
        channels: The channels after each convolution of the encoder, each with stride 2; a side of h pixels becomes
            one of h / 2, rounded up. The decoder has them in reverse.
        kernel: The side of each convolution's window, an odd number.
        hidden: The widths of the fully connected layers behind the encoder's convolutions and, in reverse, before the
            decoder's.
        activation: As in `MLP`, after each layer but the last.

    Raises:
        ValueError: If there is no shape, or a setting is out of range.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | None,
        *,
        channels: list[int] = [32, 64],  # noqa: B006  never changed
        kernel: int = 3,
        hidden: list[int] = [256],  # noqa: B006
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if shape is None or len(shape) not in (2, 3):
            raise ValueError(
                f"Expected pictures, of shape (height, width) or (channels, height, width), for the network "
                f"{type(self).__name__}; got {'data without a shape' if shape is None else tuple(shape)}. Use MLP, or "
                f"load the data as pictures."
            )
        for key, sizes in (("channels", channels), ("hidden", hidden), ("shape", shape)):
            for place, size in enumerate(sizes):
                check_int(f"{key}[{place}]", size)
        if not channels:
            raise ValueError("Expected `channels` to list one or more positive numbers; got []. Or use MLP.")
        if check_int("kernel", kernel) % 2 == 0:
            raise ValueError(f"Expected `kernel` to be odd, so that pictures of any size fit; got {kernel}.")
        check_choice("activation", activation, ACTIVATIONS)
        self.shape = (1, *shape) if len(shape) == 2 else tuple(shape)
        self.channels, self.kernel, self.hidden, self.activation = list(channels), kernel, list(hidden), activation

    @abstractmethod
    def refine(self, width: int) -> list[nn.Module]:
        """Modules that follow each convolution of `width` channels and its activation, and keep its shape."""

    def build_layers(self, context: int, start: Tensor) -> None:
        pixels, outputs = math.prod(self.shape), start.numel()
        self._joins = 0
        if context - self.others == pixels:
            layers = self._encoder(outputs)
        elif outputs and outputs % pixels == 0:
            layers = self._decoder(context, outputs // pixels)
        else:
            raise ValueError(
                f"Expected a context of {pixels} pixels, or a number of parameters for each of them, for "
                f"{type(self).__name__} on pictures of shape {self.shape}; got a context of size {context} and "
                f"{outputs} parameters. Use MLP."
            )
        self.layers = nn.Sequential(*layers)
        self.bias = nn.Parameter(start.clone())

    def apply_layers(self, standard: Tensor) -> Tensor:
        rows = standard.reshape(-1, standard.shape[-1])
        if torch.is_grad_enabled() or rows.device.type != "cpu":
            answer = self._answer(rows)
        else:
            answer = torch.cat([self._answer(part) for part in rows.split(_AT_ONCE)])
        return (answer.flatten(1) + self.bias).reshape(*standard.shape[:-1], self.bias.numel())

    def _answer(self, rows: Tensor) -> Tensor:
        """Parameters of rows (n, c); what comes beside a picture joins it where the convolutions end."""
        if not self._joins or not self.others:
            return self.layers(rows)  # type: ignore[no-any-return]
        pictures, others = rows[:, : -self.others], rows[:, -self.others :]
        flat = self.layers[: self._joins](pictures)
        return self.layers[self._joins :](torch.cat([flat, others], 1))  # type: ignore[no-any-return]

    def _encoder(self, outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Unflatten(1, self.shape)]
        for size, width in pairwise([self.shape[0], *self.channels]):
            layers += [nn.Conv2d(size, width, self.kernel, 2, self.kernel // 2), self._act(), *self.refine(width)]
        layers.append(nn.Flatten())
        self._joins = len(layers)
        widths = [math.prod(self._sizes()[-1]) * self.channels[-1] + self.others, *self.hidden]
        for size, width in pairwise(widths):
            layers += [nn.Linear(size, width), self._act()]
        return [*layers, nn.Linear(widths[-1], outputs, bias=False)]

    def _decoder(self, context: int, each: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        smallest = (self.channels[-1], *self._sizes()[-1])
        for size, width in pairwise([context, *reversed(self.hidden), math.prod(smallest)]):
            layers += [nn.Linear(size, width), self._act()]
        layers.append(nn.Unflatten(1, smallest))
        channels, sizes = [*reversed(self.channels), each * self.shape[0]], self._sizes()[::-1]
        for (size, width), (small, large) in zip(pairwise(channels), pairwise(sizes), strict=True):
            even = large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1  # 1 for an even side, 0 for an odd one
            layers += self.refine(size)
            layers += [nn.ConvTranspose2d(size, width, self.kernel, 2, self.kernel // 2, even), self._act()]
        layers[-2].register_parameter("bias", None)  # each pixel has one of its own
        return layers[:-1]

    def _sizes(self) -> list[tuple[int, int]]:
        """Height and width of the picture and after each convolution."""
        height, width = self.shape[1:]
        return [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(self.channels) + 1)]

    def _act(self) -> nn.Module:
        return ACTIVATIONS[self.activation]()


class Conv(Picture):
    """Convolutions with stride 2, and fully connected layers between them and the latent side.

    If the context is as large as the picture this is an encoder, from a picture to parameters; else a decoder, from a
    context to the parameters of each pixel, the first parameter of all pixels first. A side may have any number of
    pixels, odd or even. What is given beside the picture, such as a label, joins it behind the convolutions. A decoder
    whose context happens to be as large as the picture is built as an encoder, which serves, but without a picture's
    neighbourhoods.
    """

    def refine(self, width: int) -> list[nn.Module]:
        return []


class ResidualConv(Picture):
    """As `Conv`, with a residual block after each of its convolutions.

    The block is h + conv(activation(conv(activation(h)))). In the decoder it comes before the convolution.

    References:
        Identity Mappings in Deep Residual Networks (He, Zhang, Ren, Sun 2016), without normalisation.
    """

    def refine(self, width: int) -> list[nn.Module]:
        convolve = [nn.Conv2d(width, width, self.kernel, padding=self.kernel // 2) for _ in range(2)]
        return [Residual(self._act(), convolve[0], self._act(), convolve[1])]
