"""What benchmarks/function.py and benchmarks/recover.py share: real weights, and a table against the original."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from measuring import SAMPLE, head, parser, row
from torch import nn

import normsurgeon as ns
from normsurgeon.inference.views import Data


def image_parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line that takes a folder of ImageNet class folders; see ``check``."""
    arguments = parser(doc)
    arguments.add_argument("images", nargs="?", type=Path, default=SAMPLE)
    return arguments


def check(options: argparse.Namespace) -> None:
    """Exit with 1 if there are no images."""
    if not options.images.is_dir():
        sys.exit(f"no images at {options.images}: give a folder of ImageNet class folders")


class Against:
    """Prints a Markdown table of networks, each compared with ``original`` on the same images; ``more`` columns."""

    def __init__(self, original: nn.Module, images: Data, first: str, more: Sequence[str] = ()) -> None:
        self.original, self.images = original, images
        self.top1 = ns.evaluate(original, images).top1 or 0.0
        print(head((first, "top-1", "of BN", "agreement", "KL (nats)", *more)))

    def add(self, label: str, network: nn.Module, *more: object) -> None:
        """One row."""
        found = ns.evaluate(network, self.images, baseline=self.original)
        top1 = found.top1 or 0.0
        share = f"{100 * top1:.1f} ± {100 * (found.top1_stderr or 0):.1f}"
        numbers = (f"{number:.3f}" for number in (top1 / self.top1, found.agreement, found.kl))
        print(row((label, share, *numbers, *more)), flush=True)
