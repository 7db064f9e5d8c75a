"""A document as plain aligned text, for ``print``, pipes and files: nothing cut off, no colour codes."""

from __future__ import annotations

from normsurgeon.render.document import Document


def to_text(document: Document, ascii_only: bool = False) -> str:
    """All of it, in lines that end with a newline."""
    raise NotImplementedError
