"""Which part of each tensor one rank of several keeps, and where in the checkpoint it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.models.parameters import Parameter, Source


@dataclass(frozen=True)
class Keep:
    """Ranges [start, stop) of one axis of a parameter, one behind the other, and then `padding` zeros.

    A shard without elements is left out of the model.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]
    padding: int = 0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shard's shape, of a parameter of this shape."""
        length = sum(stop - start for start, stop in self.ranges) + self.padding
        return (*whole[: self.axis], length, *whole[self.axis + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """A copy of the shard of a whole parameter."""
        parts = [whole.narrow(self.axis, start, stop - start) for start, stop in self.ranges]
        if self.padding:
            shape = (*whole.shape[: self.axis], self.padding, *whole.shape[self.axis + 1 :])
            parts.append(whole.new_zeros(shape))
        return torch.cat(parts, dim=self.axis) if parts else whole.new_empty(self.shape(whole.shape))


Cut = Callable[[Parameter], Keep | None]
"""What is kept of a parameter; None: all of it."""


@dataclass(frozen=True)
class Piece:
    """A part of a checkpoint tensor and the region of the shard that it fills."""

    source: Source
    take: tuple[slice, ...]
    region: tuple[int | slice, ...]

    @property
    def numel(self) -> int:
        """Elements read."""
        count = 1
        for part in self.take:
            count *= part.stop - part.start
        return count


def pieces(source: Source, keep: Keep | None) -> Iterator[Piece]:
    """What a rank reads of a source, which is nothing when it keeps none of it."""
    expert: tuple[int, ...] = () if source.expert is None else (source.expert,)
    everything = [slice(0, size) for size in source.shape]
    placed = [slice(source.start, source.start + source.shape[0]), *everything[1:]]
    if keep is None:
        yield Piece(source, tuple(everything), (*expert, *placed))
        return
    axis = keep.axis - len(expert)
    first = source.start if axis == 0 else 0  # where the source begins on the axis that is cut
    reached = 0
    for start, stop in keep.ranges:
        low, high = max(start, first), min(stop, first + source.shape[axis])
        if low < high:
            take, region = list(everything), list(placed)
            take[axis] = slice(low - first, high - first)
            region[axis] = slice(reached + low - start, reached + high - start)
            yield Piece(source, tuple(take), (*expert, *region))
        reached += stop - start
