"""A document for rich: as wide, and as colourful, as the terminal is."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult

from normsurgeon.render.document import Document


class TerminalDocument:
    """What ``Console.print`` shows of a document."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        raise NotImplementedError
