"""The over-the-air package of a network: as good as its bytes allow, or as small as its loss allows."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.progress import progress_bar
from pipeline.exporting.files import description_of, self_test
from pipeline.exporting.judging import Judgement
from pipeline.exporting.quantise import LayerQuantiser, Quantised
from pipeline.exporting.sensitivity import Sensitivity
from pipeline.models.coded_layers import coded_layers
from pipeline.models.sqz.decoder import Grid, Package, decode
from pipeline.models.sqz.encoder import Encoded, encode, make_grid, pack
from pipeline.training.trained import Trained

FIRST_PRICE = 3e-8
"""Nats per bit: what a loss of 0.03 at 0.4 MB comes to."""
PRICES = (1e-13, 1e-4)
"""Cheapest: weights nearly as they are. Dearest: hardly any are left."""
SIZE_EXPONENT = -0.155
"""How the size goes with the price: measured on the published weights; only the first guess depends on it."""
NUM_TRIES = 12
CLOSE_ENOUGH = 0.004
"""Of max_bytes may stay unused."""
SAME_PRICE = 1.2
"""Prices nearer to one another than this give sizes within 3 %."""


@dataclass(frozen=True)
class Made:
    """A package, and the network that a device gets from it."""

    encoded: Encoded
    network: nn.Module
    nats_per_bit: float
    expected_loss: float
    """Rise of the loss by the sensitivities, in nats per picture."""


class PackageMaker:
    """Makes packages of one network, at any price of a bit."""

    def __init__(
        self,
        trained: Trained,
        sensitivities: Mapping[str, Sensitivity] | None,
    ) -> None:
        """Prepare every layer.

        Args:
            trained: The network.
            sensitivities: By layer; None: not known.
        """
        self._trained, self._knows_the_loss = trained, sensitivities is not None
        self._layers = {
            name: LayerQuantiser(layer.weight, None if sensitivities is None else sensitivities.get(name))
            for name, layer in coded_layers(trained.model)
        }

    def make(self, nats_per_bit: float, told: Callable[[int], None] = lambda _: None) -> Made:
        """Return the package at a price of a bit.

        Args:
            nats_per_bit: The price.
            told: Hears how many weights are rounded, after each layer.
        """
        quantised: dict[str, Quantised] = {}
        num_rounded = 0
        for name, layer in self._layers.items():
            quantised[name] = found = layer.quantise(nats_per_bit)
            num_rounded += found.symbols.numel()
            told(num_rounded)
        grids = {f"{name}.weight": make_grid(found.symbols.numpy(), found.step) for name, found in quantised.items()}
        return self._assemble(quantised, grids, nats_per_bit)

    def make_on(self, base: Package) -> Made:
        """Return the package on the grid of an older one, near to it.

        Raises:
            CheckpointError: The older one is of another model.
        """
        nats_per_bit = float(base.meta["nats_per_bit"])
        shapes = {f"{name}.weight": layer.weight.shape for name, layer in coded_layers(self._trained.model)}
        if {name: values.shape for name, values in base.symbols.items()} != {
            name: tuple(shape) for name, shape in shapes.items()
        }:
            raise CheckpointError(f"base= is a package of another model than {self._trained.name}: export without it.")
        quantised: dict[str, Quantised] = {}
        for name, layer in self._layers.items():
            grid = base.grids[f"{name}.weight"]
            quantised[name] = layer.quantise(
                nats_per_bit,
                step=grid.step,
                anchor=torch.from_numpy(base.symbols[f"{name}.weight"].copy()),
                bounds=(grid.lowest, grid.lowest + len(grid.codes) - 1),
            )
        return self._assemble(quantised, base.grids, nats_per_bit)

    def _assemble(self, quantised: Mapping[str, Quantised], grids: Mapping[str, Grid], nats_per_bit: float) -> Made:
        network = copy.deepcopy(self._trained.model)
        modules = dict(network.named_modules())
        for name, found in quantised.items():
            bias = modules[name].bias
            if isinstance(bias, Tensor):
                bias.data += found.bias_change.to(bias)
        tensors: dict[str, np.ndarray] = {}
        for name, value in network.state_dict().items():
            layer = name.removesuffix(".weight")
            tensors[name] = quantised[layer].symbols.numpy() if name in grids else _plain(value)
        description = {**description_of(self._trained), "nats_per_bit": nats_per_bit}
        draft = pack(description, tensors, grids, [])
        network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in draft.tensors().items()})
        made = encode(pack(description, tensors, grids, self_test(network, self._trained)))
        return Made(made, network, nats_per_bit, sum(found.loss for found in quantised.values()))

    @contextlib.contextmanager
    def _tries(self) -> Iterator[Iterator[Callable[[int], None]]]:
        """Yield the tries, each as what hears how many of its weights are rounded; a bar shows it."""
        num_weights = max(1, sum(layer.num_weights for layer in self._layers.values()))
        with progress_bar("package", num_weights) as bar:

            def all_of_them() -> Iterator[Callable[[int], None]]:
                for number in range(1, NUM_TRIES + 1):
                    bar.update(0, f"package, try {number} of at most {NUM_TRIES}")
                    yield bar.update

            yield all_of_them()

    def within(self, max_bytes: int) -> Made:
        """Return the best package of at most so many bytes.

        Raises:
            ConfigError: None is so small; says the smallest and what its loss would be.
        """
        price, best, size_at = FIRST_PRICE, None, dict[float, int]()
        with self._tries() as tries:
            for told in tries:
                made = self.make(price, told)
                size_at[price] = size = len(made.encoded.content)
                if size <= max_bytes and (best is None or price < best.nats_per_bit):
                    best = made
                if max_bytes * (1 - CLOSE_ENOUGH) <= size <= max_bytes or price == PRICES[1]:
                    break
                # A little below the bound.
                price = _next_price(size_at, max_bytes * (1 - CLOSE_ENOUGH / 2))
        if best is not None:
            return best
        smallest = self.make(PRICES[1])
        cost = f", and would raise the loss by about {smallest.expected_loss:.2g}" if self._knows_the_loss else ""
        raise ConfigError(
            f"max_bytes={max_bytes:,} cannot be reached: the smallest package of {self._trained.name} has"
            f" {len(smallest.encoded.content):,} bytes{cost}. Raise max_bytes, or train a smaller or a pruned network."
        )

    def losing(self, max_loss: float, judge: Callable[[nn.Module], Judgement]) -> Made:
        """Return the smallest package that raises the loss by at most so much.

        Both the change of the loss and the Kullback-Leibler divergence must keep to the bound. The latter is what the
        loss would rise by if the weights' own answers were the truth: it needs no labels, is far less noisy, and does
        not take it for a gain when a network that has learnt nothing is taken apart.

        Args:
            max_loss: In nats per picture, on the pictures of `judge`.
            judge: Compares a network with the weights as they are.

        Raises:
            ConfigError: Even the finest grid loses more.
        """
        price, bracket = FIRST_PRICE, list(PRICES)
        best: Made | None = None
        with self._tries() as tries:
            for told in tries:
                made = self.make(price, told)
                judgement = judge(made.network)
                lost = max(judgement.loss_change, judgement.kl_divergence)
                if lost <= max_loss:
                    best, bracket[0] = made, price
                else:
                    bracket[1] = price
                if best is not None and bracket[1] / bracket[0] < SAME_PRICE:
                    break
                # The loss goes about as the price.
                guess = price * min(8.0, max(1 / 8, 0.95 * max_loss / max(lost, 1e-12)))
                price = guess if bracket[0] < guess < bracket[1] else math.sqrt(bracket[0] * bracket[1])
        if best is None:
            raise ConfigError(f"max_loss={max_loss:g} cannot be kept to by any package: raise it, or ship safetensors.")
        return best


def _next_price(size_at: Mapping[float, int], wanted: float) -> float:
    """Return the price to try next: where a line through the nearest sizes, both logarithms, has the wanted one."""
    too_large = max((price for price, size in size_at.items() if size > wanted), default=None)
    small = min((price for price, size in size_at.items() if size <= wanted), default=None)
    near = too_large if small is None else small
    assert near is not None
    slope, bounds = SIZE_EXPONENT, PRICES
    if too_large is not None and small is not None:
        slope = math.log(size_at[small] / size_at[too_large]) / math.log(small / too_large)
        edge = (small / too_large) ** 0.1
        bounds = (too_large * edge, small / edge)
    guess = math.log(near) + math.log(wanted / size_at[near]) / min(slope, -1e-3)
    return min(max(math.exp(min(guess, 0.0)), bounds[0]), bounds[1])


def read_package(path: str, content: bytes) -> Package:
    """Decode an older package.

    Raises:
        CheckpointError: It is none, or is damaged.
    """
    try:
        package = decode(content)
        float(package.meta["nats_per_bit"])
    except Exception as error:
        raise CheckpointError(f"{path} is no sound .sqz package ({error}): copy it again.") from error
    return package


def _plain(value: Tensor) -> np.ndarray:
    """Return a tensor that is not coded: float16 where that holds it, as biases; else float32, or int64."""
    if not value.is_floating_point():
        return value.cpu().numpy().astype(np.int64)
    array: np.ndarray = value.detach().float().cpu().numpy()
    halved = array.astype(np.float16)
    close = np.isfinite(halved).all() and np.allclose(halved.astype(np.float32), array, rtol=1e-3, atol=1e-6)
    return halved if close else array
