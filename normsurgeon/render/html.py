"""A document as one self-contained page, or as what a notebook cell shows."""

from __future__ import annotations

from normsurgeon.render.document import Document


def to_page(document: Document) -> str:
    """The whole page: no request leaves it, light and dark, for a desktop and a phone."""
    raise NotImplementedError


def to_notebook(document: Document) -> str:
    """A fragment of HTML that neither runs anything nor styles anything outside itself."""
    raise NotImplementedError
