"""What every result that can be shown has in common: it makes a document, and prints, shows and saves itself by it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from normsurgeon.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from normsurgeon.render.document import Document


class Presentable:
    """``print(it)`` shows plain text, rich a terminal's output, a notebook HTML; a subclass makes the ``document()``.

    A renderer is imported when it is needed: the numbers come without it.
    """

    def document(self) -> Document:
        """What there is to show."""
        raise NotImplementedError

    def __str__(self) -> str:
        """All of it as plain text."""
        from normsurgeon.render.text import to_text

        return to_text(self.document())

    def __rich__(self) -> RenderableType:
        """As wide, and as colourful, as the terminal is."""
        from normsurgeon.render.terminal import TerminalDocument

        return TerminalDocument(self.document())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all of it as one self-contained page, ``.html``.

        :raises UsageError: another ending.
        :raises WriteError: a file that cannot be written.
        """
        path = Path(path)
        if path.suffix != ".html":
            raise UsageError(f"{path}: this is written as a page, and its name must end in .html")
        from normsurgeon._util.files import check_writable, write_text
        from normsurgeon.render.html import to_page

        check_writable(path)
        write_text(path, to_page(self.document()))
        return path

    def _repr_html_(self) -> str:
        """What a notebook shows: no script, and styles that touch nothing else."""
        from normsurgeon.render.html import to_notebook

        return to_notebook(self.document())
