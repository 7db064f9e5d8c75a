"""The sums of a swap sensitivity, batch by batch, and the file in which a run that is stopped leaves them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.files import check_writable, write_text
from normsurgeon.calls import Call
from normsurgeon.errors import CheckpointError, UsageError
from normsurgeon.graph.skeleton import tensors_in
from normsurgeon.selection.damage import Damage

FORMAT = "normsurgeon-swap-sums 1"


@dataclass
class SwapSums:
    """Damages by site, and what the predictors give.

    whole    of all sites together
    ones     of each site alone; ``others`` of all but it
    errors   the norm's squared relative error and the Taylor estimate of each image, by site
    batches  the checksum of each batch that is in the sums
    """

    sites: Sequence[str]
    whole: Damage = field(default_factory=Damage)
    ones: dict[str, Damage] = field(default_factory=dict)
    others: dict[str, Damage] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    taylors: dict[str, list[float]] = field(default_factory=dict)
    batches: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for damages in (self.ones, self.others):
            for site in self.sites:
                damages.setdefault(site, Damage())

    def predicted(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a batch's predictions."""
        for site, (error_N, taylor_N) in found.items():
            self.errors.setdefault(site, []).extend(error_N.tolist())
            self.taylors.setdefault(site, []).extend(taylor_N.tolist())


@dataclass
class Resumable:
    """The sums in a file, written after each batch; without ``path`` nothing is kept.

    settings  what the sums depend on, the network's weights included, in plain types: a file of others is refused
    """

    path: Path | None
    settings: Any
    sums: SwapSums
    done: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str] | None, model: nn.Module, settings: Any, sites: Sequence[str]
    ) -> Resumable:
        """With what is in the file, if there is one.

        :raises CheckpointError: a file that is something else.
        :raises UsageError: a file of other settings, or of another network.
        :raises WriteError: a file that could not be written.
        """
        if path is None:
            return cls(None, None, SwapSums(sites))
        path = Path(path)
        settings = json.loads(json.dumps([settings, checksum(model.state_dict().values())]))
        check_writable(path)
        if not path.exists():
            return cls(path, settings, SwapSums(sites))
        try:
            if not path.is_file():
                raise OSError("no regular file")
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise ValueError(values["format"])
            sums = values["sums"]
            read = SwapSums(
                sites,
                Damage(**sums["whole"]),
                {site: Damage(**damage) for site, damage in sums["ones"].items()},
                {site: Damage(**damage) for site, damage in sums["others"].items()},
                sums["errors"],
                sums["taylors"],
                sums["batches"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not what a swap sensitivity leaves: {type(error).__name__}") from error
        if values["settings"] != settings:
            raise UsageError(f"{path} is of another network or other settings: give another file, or delete it")
        return cls(path, settings, read, list(read.batches))

    def skips(self, inputs: Tensor | Call) -> bool:
        """Whether a batch is in the sums already.

        :raises UsageError: if another batch stood in its place.
        """
        if not self.done:
            return False
        if self.done.pop(0) != checksum(tensors_in(inputs)):
            raise UsageError(f"{self.path} is of other images: give another file, or delete it")
        return True

    def add(self, inputs: Tensor | Call) -> None:
        """Write the sums, with one batch more in them."""
        if self.path is not None:
            self.sums.batches.append(checksum(tensors_in(inputs)))
            sums = {key: value for key, value in asdict(self.sums).items() if key != "sites"}
            write_text(self.path, json.dumps({"format": FORMAT, "settings": self.settings, "sums": sums}))


def checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
