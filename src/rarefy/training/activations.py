"""Activations rounded during training: every chosen layer sees its input as integers will hold it.

The range of each input follows the batches as a moving average of their smallest and largest value, and
always contains zero, which has a code of its own. With 2^b codes,

    s = (high - low) / (2^b - 1),   z = round(-low / s),   x' = s (clip(round(x / s) + z, 0, 2^b - 1) - z),

and the gradient passes straight through where x was not clipped. In the first steps, while the network is
still finding its ranges, nothing is rounded. What remains are the ranges: an integer runtime needs nothing
else to run the network that was trained.

At few bits a range that holds everything is coarse. Learned, both ends begin where the moving average is when
rounding begins, and move by factors exp(t) of their own, with the gradients of learned steps,

    dx'/ds = (x' - x) / s   where x was not clipped,   dx'/dhigh = 1  above,   dx'/dlow = 1  below,

times 1 / sqrt(n (2^b - 1)) for n numbers in a sample: what is rare is clipped where the loss gains by it.

Paper: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.1 and eq. 12; Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized
Neural Networks", eq. 1-3; Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization through learnable
offsets and better initialization", section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rarefy.core.errors import DataError, RecipeError, did_you_mean
from rarefy.core.latent import passed
from rarefy.models.hooks import hooked
from rarefy.numerics.ranges import Range

PACE = 10.0  # how much faster than weights ranges learn, relative to their own size


@dataclass(frozen=True)
class Rounding:
    """Which inputs are rounded during training, and how.

    bits: 2 to 8. memory: share of the old range that every batch leaves. delay: share of the training before
    rounding begins. where: globs over the paths of sites, or ``role:NAME``; look-ups have no input to round.
    learned: whether ranges learn once rounding has begun, where else they follow the batches.
    """

    bits: int = 8
    memory: float = 0.99
    delay: float = 0.0
    where: tuple[str, ...] = ("*",)
    learned: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not 0 <= self.memory < 1 or not 0 <= self.delay < 1:
            raise RecipeError(f"activations: bits {self.bits}, memory {self.memory}, delay {self.delay}: "
                              "bits must lie between 2 and 8, memory and delay be shares below 1")

    def of(self, layers: Sequence[str], steps: int) -> Activations:
        """For these layers, in a training of so many steps."""
        return Activations(layers, self.bits, self.memory, round(self.delay * steps), learned=self.learned)


class Activations(nn.Module):
    """Ranges of the inputs of some layers, and their rounding.

    layers: names of modules. bits: 2 to 8. memory: share of the old range that every batch leaves. delay:
    steps before rounding begins. learned: whether ranges are parameters from then on (the first batch gives
    one in any case). In eval mode ranges stand still and rounding is on.
    """

    def __init__(self, layers: Sequence[str], bits: int = 8, memory: float = 0.99, delay: int = 0, *,
                 learned: bool = False) -> None:
        super().__init__()
        if not layers:
            raise RecipeError("no layers to watch the inputs of")
        if not 2 <= bits <= 8 or not 0 <= memory < 1 or delay < 0:
            raise RecipeError(f"activations: bits {bits}, memory {memory}, delay {delay}: bits must lie "
                              "between 2 and 8, memory be a share below 1, delay not negative")
        self.layers, self.bits, self.memory, self.delay = tuple(layers), bits, memory, delay
        self.low: Tensor
        self.high: Tensor
        self.seen: Tensor
        self.steps: Tensor
        self.register_buffer("low", torch.zeros(len(layers)))
        self.register_buffer("high", torch.zeros(len(layers)))
        self.register_buffer("seen", torch.zeros(len(layers), dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.stretch = nn.Parameter(torch.zeros(len(layers), 2)) if learned else None  # of low and of high

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """While this lasts, the inputs of the layers are watched and rounded; no hook is left behind."""
        parts = dict(network.named_modules())
        for name in self.layers:
            if name not in parts:
                raise RecipeError(f"{name}: no such layer{did_you_mean(name, list(parts))}")
        with hooked(before=[(parts[name], self._hook(index)) for index, name in enumerate(self.layers)]):
            yield

    def settled(self) -> bool:
        """Whether rounding has begun: what a gate likes before is another network."""
        return int(self.steps) >= self.delay

    def ranges(self) -> dict[str, Range]:
        """What was found, by layer; DataError for a layer that never ran."""
        never = [name for name, seen in zip(self.layers, self.seen.tolist(), strict=True) if not seen]
        if never:
            raise DataError(f"{never[0]}: has seen no input; run the network in training mode first")
        lows, highs = (end.detach().tolist() for end in self._ends(slice(None)))
        return {name: Range(low, high, self.bits)
                for name, low, high in zip(self.layers, lows, highs, strict=True)}

    def paces(self) -> dict[str, float]:
        """Ranges learn by a share of their size, as steps of weights do."""
        return {} if self.stretch is None else {"stretch": PACE}

    def rounded(self, index: int, x: Tensor) -> Tensor:
        """An input of one layer as its codes stand for it."""
        if self.training:
            if self.stretch is None or int(self.steps) < max(1, self.delay):
                self._follow(index, x.detach())
            if int(self.steps) < self.delay:
                return x
        top = float(2**self.bits - 1)
        low, high = self._ends(index)
        scale = (high - low) / top
        if not scale > 0:  # nothing but zeros has come
            return x
        s = scale.detach()
        zero = (-low.detach() / s).round()
        code = (x.detach() / s).round() + zero
        inside = ((code >= 0) & (code <= top)).float()
        held = passed((code.clamp(0, top) - zero) * s, x, inside)
        if self.stretch is None:
            return held
        pull = (x[:1].numel() * top) ** -0.5
        return (held + _moved(scale, pull * inside * (held - x).detach() / s)
                + _moved(high, pull * (code > top).float()) + _moved(low, pull * (code < 0).float()))

    def _ends(self, index: int | slice) -> tuple[Tensor, Tensor]:
        """Low and high, one each or of all layers, with zero between."""
        low, high = self.low[index].clamp_max(0), self.high[index].clamp_min(0)
        if self.stretch is None:
            return low, high
        return low * self.stretch[index, 0].exp(), high * self.stretch[index, 1].exp()

    def _follow(self, index: int, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        old = self.memory if bool(self.seen[index]) else 0.0
        self.low[index] = old * self.low[index] + (1 - old) * low
        self.high[index] = old * self.high[index] + (1 - old) * high
        self.seen[index] = True

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def call(part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self.rounded(index, inputs[0]), *inputs[1:])

        return call


def _moved(end: Tensor, factor: Tensor) -> Tensor:
    """Nothing, with the gradient ``factor`` to an end or the step of a range."""
    return passed(torch.zeros_like(factor), end, factor)
