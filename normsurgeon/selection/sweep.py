"""The damage of many changes of one site each, measured on the same images without a full forward pass a change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.calls import Call, on, outputs_of
from normsurgeon.data.label_ways import Labels
from normsurgeon.errors import UsageError
from normsurgeon.inference.run import home_of
from normsurgeon.inference.views import Data, Views, no_images, open_views
from normsurgeon.selection.damage import Answers, Damage, damages
from normsurgeon.selection.replay import NotRepeatableError, replaying
from normsurgeon.selection.switching import Option, Switchable

PROBED = 2
"""Images of the first batch on which every cut is tried before it is relied on."""

LEAST_IMAGES = 32
"""Before a site counts as harmless."""


@dataclass(frozen=True)
class Change:
    """One site, switched to ``option`` (None: back to its batch norm)."""

    site: str
    option: Option | None


@dataclass
class Sweep:
    """Damages of single changes of a base configuration.

    board     the network
    base      the options that are chosen where nothing else is said; sites that are not named keep their batch norm
    found     what is tried, one at a time, with the damage so far
    harmless  a change is measured no further once its damage is under this with three standard errors
    """

    board: Switchable
    base: Mapping[str, Option | None]
    found: dict[Change, Damage]
    harmless: float = 0.0
    _changed: set[int] = field(default_factory=set)
    _whole: set[str] | None = None

    def update(
        self, inputs: Tensor | Call, before: Answers, on_step: Callable[[int], None] = lambda steps: None
    ) -> None:
        """Add a batch; ``before`` are the original's answers to it. ``on_step`` is called with changes done."""
        board, images = self.board, len(inputs)
        inputs = on(inputs, *home_of(board.network))
        board.reset()
        board.choose(self.base)
        with torch.no_grad():
            if self._whole is None:
                self._whole = self._try_cuts(inputs[:PROBED] if images > PROBED else inputs)
            with replaying(board.network, self._changed) as replay:
                replay.record(inputs)
                for site, changes in self._in_order(replay.first_call):
                    wanted = [change for change in changes if not self._is_harmless(change)]
                    cut = replay.first_call(board.sites[site])
                    if cut is None:
                        continue  # no call reaches it
                    if wanted and site not in self._whole:
                        replay.advance(cut)
                    for change in wanted:
                        output = self._output(change, replay.run if site not in self._whole else replay.run_whole)
                        after = Answers.of(output, images, before.classes)
                        self.found[change].update(*damages(before, after, images))
                    on_step(len(changes))
        board.reset()

    def _output(self, change: Change, run: Callable[[], Any]) -> Any:
        self.board.choose({change.site: change.option})
        try:
            return run()
        finally:
            self.board.choose({change.site: self.base.get(change.site)})

    def _in_order(self, first_call: Callable[[Any], int | None]) -> list[tuple[str, list[Change]]]:
        """The sites in the order of their first calls, each with its changes; sites that are not called come last."""
        by_site: dict[str, list[Change]] = {}
        for change in self.found:
            by_site.setdefault(change.site, []).append(change)
        calls = {site: first_call(self.board.sites[site]) for site in by_site}
        return sorted(by_site.items(), key=lambda item: float("inf") if (c := calls[item[0]]) is None else c)

    def _is_harmless(self, change: Change) -> bool:
        seen = self.found[change]
        if seen.images < LEAST_IMAGES:
            return False
        mean, error = seen.compute()
        return mean + 3 * error < self.harmless

    def _try_cuts(self, inputs: Any) -> set[str]:
        """The sites at which a run from the middle does not give what a whole run gives: those get whole runs."""
        whole: set[str] = set()
        with replaying(self.board.network, self._changed) as replay:
            wanted = Answers.of(replay.record(inputs), len(inputs)).outputs
            for site, _ in self._in_order(replay.first_call):
                cut = replay.first_call(self.board.sites[site])
                if cut is None:
                    continue
                try:
                    replay.find_changed(cut)
                    found = Answers.of(replay.run(), len(inputs)).outputs
                except NotRepeatableError:
                    whole.add(site)
                    continue
                if len(found) != len(wanted) or not all(map(torch.equal, wanted, found)):
                    whole.add(site)
        return whole


def original_answers(board: Switchable, inputs: Tensor | Call, labels: Tensor | None = None) -> Answers:
    """What the original gives for a batch."""
    board.reset()
    with torch.no_grad():
        output = outputs_of(board.network, on(inputs, *home_of(board.network)))
    return Answers.of(output, len(inputs), labels=labels)


def damages_of(
    board: Switchable, chosen: Mapping[str, Option | None], inputs: Tensor | Call, before: Answers
) -> tuple[Tensor, Tensor | None]:
    """The damages of one whole configuration for a batch, as ``damage.damages``."""
    board.reset()
    board.choose(chosen)
    with torch.no_grad():
        output = outputs_of(board.network, on(inputs, *home_of(board.network)))
    board.reset()
    return damages(before, Answers.of(output, len(inputs), before.classes), len(inputs))


@dataclass
class SweptBatches:
    """The inputs of a model's batches, the same at every pass."""

    views: Views
    batch_size: int

    @classmethod
    def open(
        cls,
        model: nn.Module,
        data: Data,
        batch_size: int,
        max_images: int | None,
        workers: int,
        labels: Labels = "none",
    ) -> SweptBatches:
        """Of whatever a caller hands in as data.

        :raises UsageError: batches that can be passed over only once.
        :raises DataError: no images.
        """
        views = open_views(data, [model], batch_size, max_images, workers, classifiers=False, labels=labels)
        if not views.repeatable:
            raise UsageError(
                "the batches are an iterator, which can be passed over only once; try a list, or a DataLoader"
            )
        return cls(views, batch_size)

    def __iter__(self) -> Iterator[Tensor | Call]:
        return (images[0] for images, _ in self.views)

    def example(self) -> Tensor | Call:
        """One image, as the model takes it: what a plan needs to know of the size of its maps.

        :raises DataError: no images.
        """
        for images, _ in self.views:
            if len(images[0]):
                return images[0][:1]
        raise no_images(self.views)

    def labelled(self) -> Iterator[tuple[Tensor | Call, Tensor | None]]:
        """The inputs with their labels, where there are any."""
        return ((images[0], labels) for images, labels in self.views)

    def steps(self, each: int) -> int | None:
        """How many steps there are if each batch takes so many."""
        total = self.views.total
        return None if total is None else each * -(-total // self.batch_size)
