"""What the installation must offer, and one clear line when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from normsurgeon.errors import EnvironmentProblem


@contextmanager
def explained_imports() -> Iterator[None]:
    """Turn the known ways in which importing torch, torchvision and timm fails into one line.

    A torch and a torchvision of different builds (a CPU-only torch beside the registry's torchvision) import
    separately, and die together inside timm with "operator torchvision::nms does not exist".
    """
    try:
        yield
    except (RuntimeError, AttributeError, ImportError) as error:
        known = ("torchvision::nms", "torchvision' has no attribute 'extension")
        if not any(text in str(error) for text in known):
            raise
        raise EnvironmentProblem(
            "torch and torchvision here come from different builds, and timm cannot be imported "
            f"({error}); try: pip install --force-reinstall torch torchvision timm"
        ) from error
