"""Choose the roundings of all layers of a unit together, by gradients of the unit's output error.

What it does
    The unit runs in torch as the quantized graph has it, with soft weights (`SoftRounding`), a
    scale and an offset for each output channel that can take them, and steps of activation
    quantizers that follow the gradient (LSQ). Adam lowers the squared error at the unit's output on
    the calibration batches; a penalty then draws the weights to integers. Inputs are those of the
    quantized graph.
Few samples
    A unit whose integers, as they come from closed forms, do better on the batches to fit than on
    held-out ones, each in units of what rounding to nearest does there, has learned those by heart,
    and would go on with it. (Held-out batches may just be harder, or easier.) Its inputs are mixed
    element by element with those of the float graph, and so are activations behind their quantizers
    inside of the unit (QDrop): the roundings get used to noise instead of learning the noise of a
    few samples. Where there is no such gap the mixing only hides the errors that are to be made up
    for (mobilenet_v2 W3A8, second unit: held-out error 0.92 times with clean inputs, 1.08 mixed).
    Fewer and smaller steps learn less by heart, too, and such units are the widest ones.
What is promised
    The rounded result is compared with the integers that were there, on batches that nothing was
    fitted to; the caller gets both errors. The same seed gives the same integers on a CPU.

Sources: Nagel et al., AdaRound (ICML 2020); Li et al., BRECQ (ICLR 2021); Wei et al., QDrop (ICLR
2022); Esser et al., LSQ (ICLR 2020). Theirs are 20,000 iterations with a learning rate of 1e-3;
with the rate here a rounding travels from one end to the other within a few dozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from qpass.torch.batch import Batch, joined, part_of
from qpass.torch.executor import Executor, UnsupportedOpError, has_function
from qpass.torch.narrow import narrow_pays
from qpass.torch.soft_rounding import SoftRounding, beta_at, penalty
from qpass.torch.threads import limited_threads
from qpass.torch.unit_problem import Reconstruction, Settings, SoftLayer, SoftStep, UnitProblem

__all__ = [
    "Batch",
    "Reconstruction",
    "Settings",
    "SoftLayer",
    "SoftStep",
    "UnitProblem",
    "UnsupportedOpError",
    "has_function",
    "reconstruct",
]

Array = NDArray[Any]
TINY: Final = float(np.finfo(np.float32).tiny)
RATE: Final = 0.06  # of the logits
BY_HEART: Final = 1.13  # error on held-out batches against that on those to fit
DROP: Final = 0.5  # as published
FEWER_STEPS: Final = 4  # by so much they are divided where samples are too few
FEWER_ROWS: Final = 3  # likewise, of a step
DISAGREEMENT: Final = 0.01  # between torch and the engine, as a share of the error of rounding
OFFSET_RATE: Final = 1e-3  # in units of an output channel's root mean square
SCALE_RATE: Final = 1e-3  # of the logarithm of a channel's scale
SCALE_TRAVEL: Final = 0.4  # in all: int32 biases have room for a factor of two
STEP_TRAVEL: Final = 1.0  # how far the logarithm of a step can go in all iterations
STEP_RATE: Final = 0.01  # but not faster than this: a step matters to all of a tensor at once


def reconstruct(
    problem: UnitProblem, fit: Sequence[Batch], held: Sequence[Batch], settings: Settings
) -> Reconstruction:
    """Learn the roundings of a unit.

    Args:
        problem: the unit.
        fit: batches to learn from.
        held: batches to judge by.
        settings: how long and how.

    Raises:
        UnsupportedOpError: an op of the unit has no function in torch here; it is named.
    """
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with limited_threads(settings.threads), torch.backends.cudnn.flags(deterministic=True):
        unit = _SoftUnit(problem, settings, device)
        unit.measure(fit)
        before = unit.error(held, unit.old_weights)
        if settings.drop is None:
            settings = _careful(settings, unit.gap(fit, held, before))
        unit.learn(fit, settings)
        return Reconstruction(
            integers={soft.layer.name: soft.rounding.integers() for soft in unit.layers},
            offsets={soft.layer.name: soft.offset() for soft in unit.layers},
            shares={s.layer.name: s.share() for s in unit.layers if s.layer.rescale},
            steps={soft.step.name: soft.rounded() for soft in unit.steps},
            before=before,
            after=unit.error(held, unit.rounded_weights),
        )


def _careful(settings: Settings, gap: float) -> Settings:
    """Return what to do with a unit that has a `gap` between held-out batches and those to fit."""
    if gap < BY_HEART:
        return replace(settings, drop=0.0)
    return replace(
        settings,
        drop=DROP,
        iterations=-(-settings.iterations // FEWER_STEPS),
        rows=-(-settings.rows // FEWER_ROWS),
    )


def _nearest(layer: SoftLayer) -> Array:
    """Return the float model's weight rounded to nearest, float64."""
    integers = np.rint(layer.original / layer.scale + layer.zero_point).clip(*layer.bounds)
    rounded: Array = (integers - layer.zero_point) * layer.scale
    return rounded


class _SoftLayer:
    """What is learned of one layer."""

    def __init__(self, layer: SoftLayer, executor: Executor) -> None:
        self.layer = layer
        self.rounding = SoftRounding(
            layer.start,
            layer.integers,
            layer.scale,
            layer.zero_point,
            layer.bounds,
            device=executor.device,
        )
        self.old = executor.tensor((layer.integers - layer.zero_point) * layer.scale)
        self.shift = torch.zeros(layer.channels, device=executor.device)
        self.unit = torch.ones_like(self.shift)  # what a shift of 1 adds
        self.growth = torch.zeros(layer.scale.shape, device=executor.device)  # of scales, as e^x
        if layer.offset:
            self.shift.requires_grad_()
        if layer.rescale:
            self.growth.requires_grad_()

    def weight(self, up: torch.Tensor) -> torch.Tensor:
        """Return the soft weight for some `up`, with the scales as they are now."""
        weight = self.rounding.weight(up)
        return weight * self.growth.exp() if self.layer.rescale else weight

    def rounded(self) -> torch.Tensor:
        """Return the weight that the learned integers and scales stand for."""
        return self.rounding.rounded() * self.growth.detach().exp()

    def share(self) -> Array:
        """Return by what the scales are multiplied, float64."""
        share: Array = self.growth.detach().exp().cpu().numpy().astype(np.float64)
        return share

    def offset(self) -> Array:
        """Return what the bias gets, float64 [channels]."""
        learned: Array = (self.shift * self.unit).detach().cpu().numpy().astype(np.float64)
        return learned


class _SoftStep:
    """A step while it is learned: by its logarithm, so that it stays positive."""

    def __init__(self, step: SoftStep, device: str) -> None:
        self.step = step
        self.growth = torch.zeros((), device=device, requires_grad=True)

    def scale(self) -> torch.Tensor:
        """Return the step as a function of what is learned."""
        return self.step.scale * self.growth.exp()

    def rounded(self) -> float:
        """Return the step as the graph will store it: in float32."""
        return float(self.scale().detach())


class _SoftUnit:
    """A unit while its roundings are learned."""

    def __init__(self, problem: UnitProblem, settings: Settings, device: str) -> None:
        self._problem = problem
        self._executor = Executor(problem.nodes, device=device)
        self._random = torch.Generator().manual_seed(settings.seed)
        self._outputs = [name for target in problem.targets for name in target]
        self._norms = [1.0] * len(problem.targets)
        self._rows = 1  # of one batch
        self._stackable = problem.stackable
        self._narrow = narrow_pays(device)
        self.layers = [_SoftLayer(layer, self._executor) for layer in problem.layers]
        self.steps = [_SoftStep(step, device) for step in problem.steps]

    @property
    def old_weights(self) -> dict[str, torch.Tensor]:
        """The weights that the integers from before stand for."""
        return {soft.layer.weight: soft.old for soft in self.layers}

    @property
    def rounded_weights(self) -> dict[str, torch.Tensor]:
        """The weights that the learned integers stand for, and the learned steps."""
        weights = {soft.layer.weight: soft.rounded() for soft in self.layers}
        return {**weights, **{name: step.detach() for name, step in self._steps().items()}}

    def _steps(self) -> dict[str, torch.Tensor]:
        return {soft.step.constant: soft.scale() for soft in self.steps}

    # ------------------------------------------------------------------ measuring

    def measure(self, fit: Sequence[Batch]) -> None:
        """Take the error with the old integers as the unit of the loss, and sizes of outputs.

        Raises:
            UnsupportedOpError: torch computes something else than the engine does.
        """
        with torch.no_grad():
            self._measure(fit)

    def _measure(self, fit: Sequence[Batch]) -> None:
        norms = np.zeros(len(self._norms))
        for batch in fit:
            errors = self._errors(batch, self.old_weights, drop=0.0)
            norms += np.array([float(error) / len(fit) for error in errors])
        self._norms = [max(float(norm), TINY) for norm in norms]
        taps = [soft.layer.output for soft in self.layers]
        feeds = {name: self._executor.tensor(array) for name, array in fit[0].quantized.items()}
        outputs = self._executor.run({**feeds, **self.old_weights}, taps)
        seen = replace(fit[0], wanted=self._problem.seen)
        apart = self._errors(seen, self.old_weights, drop=0.0)
        for target, error, norm in zip(self._problem.targets, apart, norms, strict=True):
            if not float(error) <= DISAGREEMENT * norm:
                share = float(error) / max(norm, np.finfo(np.float64).tiny)
                raise UnsupportedOpError(
                    f"torch and the engine differ by {share:.1%} of the error", where=target[0]
                )
        self._stackable = self._stackable and self._by_samples(seen, norms)
        for soft, output in zip(self.layers, outputs, strict=True):
            by_channel = output.movedim(soft.layer.axis, 0).reshape(soft.layer.channels, -1)
            soft.unit = (
                by_channel.square().mean(dim=1).sqrt().clamp_min(torch.finfo(output.dtype).tiny)
            )
            self._rows = by_channel.shape[1]  # of the last one in the end

    def _by_samples(self, seen: Batch, norms: Array) -> bool:
        """True when samples of a batch can be put in another order, and be more.

        A shape or a mask may by chance have as many entries as there are samples.
        """
        order = np.array([*range(len(seen.wanted[0]))[::-1], 0])
        try:
            apart = self._errors(part_of(seen, order), self.old_weights, drop=0.0)
        except (RuntimeError, IndexError):  # what torch raises when shapes do not fit
            return False
        pairs = zip(apart, norms, strict=True)
        return all(float(error) <= DISAGREEMENT * norm for error, norm in pairs)

    def error(self, batches: Sequence[Batch], weights: Mapping[str, torch.Tensor]) -> float:
        """Return the mean of the loss over batches."""
        with torch.no_grad():
            losses = [float(self._loss(batch, weights, drop=0.0)) for batch in batches]
        return float(np.mean(losses))

    def gap(self, fit: Sequence[Batch], held: Sequence[Batch], before: float) -> float:
        """Return how much more of nearest rounding's error is left on held-out batches.

        `before` is the error that the old integers have there.
        """
        nearest = {
            soft.layer.weight: self._executor.tensor(_nearest(soft.layer)) for soft in self.layers
        }
        some = fit[:: max(1, len(fit) // len(held))]
        unseen = before / max(self.error(held, nearest), TINY)
        fitted = self.error(some, self.old_weights) / max(self.error(some, nearest), TINY)
        return unseen / max(fitted, TINY)

    def _loss(
        self,
        batch: Batch,
        weights: Mapping[str, torch.Tensor],
        *,
        drop: float,
        narrow: bool = False,
    ) -> torch.Tensor:
        errors = self._errors(batch, weights, drop=drop, narrow=narrow)
        parts = [error / norm for error, norm in zip(errors, self._norms, strict=True)]
        return torch.stack(parts).sum()

    def _errors(
        self,
        batch: Batch,
        weights: Mapping[str, torch.Tensor],
        *,
        drop: float,
        narrow: bool = False,
    ) -> list[torch.Tensor]:
        """Return the mean squared error of each target."""

        def mix(floating: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
            return torch.where(self._mask(quantized.shape, drop), floating, quantized)

        given = dict(weights)
        for name, array in batch.quantized.items():
            value = self._executor.tensor(array)
            floating = batch.floating[name]
            if drop and value.is_floating_point() and floating is not array:
                value = mix(self._executor.tensor(floating), value)
            given[name] = value
        added = {}
        for soft in self.layers:
            layer = soft.layer
            if layer.offset and weights[layer.weight] is not soft.old:
                behind = layer.start.ndim - 2 if layer.axis == 1 else 0
                added[layer.shifted] = (soft.shift * soft.unit).reshape(-1, *[1] * behind)
        results = iter(
            self._executor.run(
                given, self._outputs, added=added, mix=mix if drop else None, narrow=narrow
            )
        )
        errors = []
        for target, *pair in zip(self._problem.targets, batch.wanted, batch.counts, strict=True):
            wanted, counts = map(self._executor.tensor, pair)
            rest = sum(next(results) for _ in target) - wanted
            errors.append((rest.square() * counts).mean())
        return errors

    def _mask(self, shape: torch.Size, drop: float) -> torch.Tensor:
        """Return truth values that hold with the chance `drop`, to 1 / 256."""
        count = shape.numel()
        words = torch.empty(-(-count // 8), dtype=torch.int64)
        words.random_(-(2**63), None, generator=self._random)  # eight random bytes at once
        random = words.view(torch.uint8)[:count].reshape(shape)
        return (random < round(256 * drop)).to(self._executor.device)

    # ------------------------------------------------------------------ learning

    def learn(self, fit: Sequence[Batch], settings: Settings) -> None:
        """Lower the loss on some batches."""
        weights = sum(soft.rounding.logits.numel() for soft in self.layers)
        optimizer = torch.optim.Adam(
            [
                {"params": [soft.rounding.logits for soft in self.layers], "lr": RATE},
                {
                    "params": [s.shift for s in self.layers if s.layer.offset],
                    "lr": OFFSET_RATE,
                },
                {
                    "params": [s.growth for s in self.layers if s.layer.rescale],
                    "lr": min(SCALE_TRAVEL / settings.iterations, SCALE_RATE),
                },
                {
                    "params": [soft.growth for soft in self.steps],
                    "lr": min(STEP_TRAVEL / settings.iterations, STEP_RATE),
                },
            ],
            fused=True,
        )
        for step in range(settings.iterations):
            optimizer.zero_grad()
            beta = beta_at(step / settings.iterations)
            picked = self._pick(fit, settings.rows)
            for share, batch in picked:
                ups = [soft.rounding.up() for soft in self.layers]
                given = {
                    soft.layer.weight: soft.weight(up)
                    for soft, up in zip(self.layers, ups, strict=True)
                } | self._steps()
                loss = self._loss(batch, given, drop=settings.drop or 0.0, narrow=self._narrow)
                if beta is not None:
                    total = torch.stack([penalty(up, beta) for up in ups]).sum()
                    loss = loss + settings.pressure / weights * total
                (share * loss).backward()
            optimizer.step()

    def _pick(self, fit: Sequence[Batch], rows: int) -> list[tuple[float, Batch]]:
        """Return random batches for one step, each with its share of it.

        They are joined, or there is a part of one, where that can be.
        """
        count = min(len(fit), max(1, round(rows / self._rows)))
        numbers = torch.randperm(len(fit), generator=self._random)[:count].tolist()
        picked = [fit[number] for number in numbers]
        if not self._stackable:
            return [(1.0 / count, batch) for batch in picked]
        if count > 1:
            return joined(picked)
        samples = len(picked[0].wanted[0])
        share = max(1, round(samples * rows / self._rows))
        if share >= samples:
            return [(1.0, picked[0])]
        some = torch.randperm(samples, generator=self._random)[:share].numpy()
        return [(1.0, part_of(picked[0], some))]
