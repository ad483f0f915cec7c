"""Drawing the negatives of one step: uniform over the other images, without a table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pirl_plugin.functional.sampling import draw_negative_ids
from pirl_plugin.speed.measuring import Row, Settings, Work, interleaved, less, seconds_of


class AliasTable:
    """Draws from any discrete distribution in O(1) each, after O(n) of set-up in Python (Vose 1991).

    What released NPID and PIRL code builds at the start of a run, for probabilities that are all ``1 / n``.
    """

    def __init__(self, probabilities: Tensor) -> None:
        scaled = (probabilities * len(probabilities)).tolist()
        accept, alias = [0.0] * len(scaled), [0] * len(scaled)
        small = [i for i, p in enumerate(scaled) if p < 1.0]
        large = [i for i, p in enumerate(scaled) if p >= 1.0]
        while small and large:
            few, many = small.pop(), large.pop()
            accept[few], alias[few] = scaled[few], many
            scaled[many] -= 1.0 - scaled[few]
            (small if scaled[many] < 1.0 else large).append(many)
        for rest in small + large:
            accept[rest] = 1.0
        self.accept, self.alias = torch.tensor(accept), torch.tensor(alias)

    def draw(self, count: int) -> Tensor:
        """``(count,)`` ids."""
        column = torch.randint(len(self.alias), (count,))
        keep = torch.bernoulli(self.accept[column]).bool()
        return torch.where(keep, column, self.alias[column])


def rows(settings: Settings) -> Iterator[Row]:
    """Time of one draw, and of what has to be made before the first one."""
    images, batch, negatives = (100_000 if settings.quick else 1_281_167), 32, 32_000
    ids = torch.arange(batch) * (images // batch)
    tables: list[AliasTable] = []
    set_up = seconds_of(lambda: tables.append(AliasTable(torch.full((images,), 1 / images))))
    seconds = interleaved(
        {
            "ours": lambda: draw_negative_ids(ids, negatives, images),
            "theirs": lambda: tables[0].draw(batch * negatives).view(batch, negatives),
        },
        settings.repeats,
    )
    floor = batch * negatives * 8 / 1e6
    yield less(
        f"draw {batch} x {negatives:,} of {images:,}",
        "alias table",
        seconds["ours"],
        seconds["theirs"],
        wanted=3,
        detail=f"floor: {batch * negatives:,} random numbers, {floor:.1f} MB written; the table draws the own id too",
    )
    yield Row("set-up of the draw", "alias table", 0.0, set_up, "s", float("inf"), detail="there is none; theirs: O(n)")


def to_profile(settings: Settings) -> Work:
    """One draw."""
    return lambda: draw_negative_ids(torch.arange(32), 32_000, 1_281_167)
