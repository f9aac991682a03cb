"""Which layers a generated token runs. Plain integers; knows neither torch nor how tokens are batched.

A generated position counts from 0 at the first generated token; prompt tokens run every layer. Schedules are
nested: a layer that a position runs was run by every earlier one, so its keys and values are all there (SkipDecode,
arXiv 2307.02628, section 3). A layer is therefore told by one number: up to which position it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from rayskip.config import HierarchicalSkip, LayersSkip, NoSkip, SkipConfig, SkipDecodeSkip, UnifiedSkip
from rayskip.errors import ConfigError

FOREVER = 1 << 30
"""`until` of a layer that runs at every position."""

SPEEDUPS: dict[int, tuple[float, float]] = {2: (22, 11), 3: (14, 8), 4: (10, 6), 5: (8, 5)}
"""Speed-up -> (max_layers, min_layers) of the paper's OPT-6.7B (L = 32), table 2; other depths are scaled. For
OPT-1.3B (L = 24) that gives the paper's 16/8 at 2x and 6/4 at 5x."""
PAPER_LAYERS = 32


@dataclass(frozen=True)
class SkipPolicy:
    """until[l]: layer l runs for generated positions below this.

    name: what output is labelled with. Two positions with equally many layers run the same layers.
    """

    name: str
    until: tuple[int, ...]

    @classmethod
    def of(cls, name: str, schedule: Sequence[Sequence[int]], layers: int) -> SkipPolicy:
        """From the layers run at positions 0, 1, ...; the last entry holds for all later ones.

        Raises ConfigError that names the position and layer where the schedule is not nested.
        """
        sets = [set(entry) for entry in schedule]
        for position, (before, after) in enumerate(pairwise(sets), 1):
            if extra := sorted(after - before):
                raise ConfigError(
                    f"decode.skip: not nested: position {position} runs layer {extra[0]}, which position "
                    f"{position - 1} does not, so its keys and values would be missing"
                )
        ends = [sum(layer in entry for entry in sets) for layer in range(layers)]
        return cls(name, tuple(FOREVER if end == len(sets) else end for end in ends))

    @property
    def depends_on_position(self) -> bool:
        """Whether some layer runs at some generated positions only."""
        return not set(self.until) <= {0, FOREVER}

    @cached_property
    def is_full(self) -> bool:
        """Whether no layer is ever skipped."""
        return set(self.until) == {FOREVER}

    def layers(self, position: int) -> tuple[int, ...]:
        """The layers that generated position `position` runs, in order; a prompt token's position is negative."""
        return tuple(layer for layer, until in enumerate(self.until) if position < until)

    def depth(self, position: int) -> int:
        """How many layers `position` runs. Also the group key: equal depths are equal layer sets."""
        return len(self.until) if position < 0 else self._depths[min(position, len(self._depths) - 1)]

    def mean_depth(self, tokens: int) -> float | None:
        """Layers run per generated token of a row with `tokens` of them; the last one never runs."""
        if tokens < 2:
            return None
        known = self._depths[: tokens - 1]
        return (sum(known) + (tokens - 1 - len(known)) * self._depths[-1]) / (tokens - 1)

    @cached_property
    def _depths(self) -> list[int]:
        ends = [until for until in self.until if until < FOREVER]
        return [len(self.layers(position)) for position in range(max(ends, default=0) + 1)]


def full_depth(layers: int) -> SkipPolicy:
    return SkipPolicy("none", (FOREVER,) * layers)


def skip_policy(config: SkipConfig, layers: int) -> SkipPolicy:
    """The policy a config names for a model of `layers` layers.

    Raises ConfigError when the numbers do not fit the model or the schedule is not nested.
    """
    build: Callable[[SkipConfig, int], SkipPolicy] = _POLICIES[config.kind]
    policy = build(config, layers)
    return full_depth(layers) if policy.is_full else policy


def _none(config: NoSkip, layers: int) -> SkipPolicy:
    return full_depth(layers)


def _skipdecode(config: SkipDecodeSkip, layers: int) -> SkipPolicy:
    """E(n) = round((1 - t) max + t min), t = min(n / N, 1); the bottom w and the top E - w layers run."""
    most, least = skipdecode_bounds(config, layers)
    warmup = config.warmup
    if not warmup <= least <= most <= layers:
        raise ConfigError(
            f"decode.skip: warmup <= min_layers <= max_layers <= {layers} (the model's layers) is needed, "
            f"got {warmup}, {least}, {most}"
        )
    schedule = []
    for position in range(config.horizon + 1):
        share = position / config.horizon
        depth = round((1 - share) * most + share * least)
        schedule.append([*range(warmup), *range(layers - depth + warmup, layers)])
    name = f"skipdecode(warmup={warmup}, layers={most}->{least}, horizon={config.horizon})"
    return SkipPolicy.of(name, schedule, layers)


def skipdecode_bounds(config: SkipDecodeSkip, layers: int) -> tuple[int, int]:
    """(max_layers, min_layers): as given, or the paper's ratios for config.speedup."""
    if config.speedup is None:
        assert config.max_layers is not None
        assert config.min_layers is not None  # the config section sees to it
        return config.max_layers, config.min_layers
    if config.speedup == 1:
        return layers, layers
    most, least = SPEEDUPS[config.speedup]
    return round(most / PAPER_LAYERS * layers), max(round(least / PAPER_LAYERS * layers), config.warmup + 1)


def _unified(config: UnifiedSkip, layers: int) -> SkipPolicy:
    """Unified Layer Skipping (arXiv 2404.06954): first, last and evenly spaced layers at every position."""
    kept = max(int(layers / config.speedup), 2)
    chosen = {round(index * (layers - 1) / (kept - 1)) for index in range(kept)}
    return SkipPolicy.of(f"unified(speedup={config.speedup:g})", [sorted(chosen)], layers)


def _hierarchical(config: HierarchicalSkip, layers: int) -> SkipPolicy:
    """HSD (arXiv 2403.14919): every (skip + 1)th layer runs."""
    return SkipPolicy.of(f"hierarchical(skip={config.skip})", [range(0, layers, config.skip + 1)], layers)


def _layers(config: LayersSkip, layers: int) -> SkipPolicy:
    for entry in config.layers:
        if bad := [layer for layer in entry if not 0 <= layer < layers]:
            raise ConfigError(f"decode.skip.layers: the model has layers 0 to {layers - 1}, got {bad[0]}")
    return SkipPolicy.of("layers", config.layers, layers)


_POLICIES: dict[str, Callable[..., SkipPolicy]] = {
    "none": _none,
    "skipdecode": _skipdecode,
    "unified": _unified,
    "hierarchical": _hierarchical,
    "layers": _layers,
}
