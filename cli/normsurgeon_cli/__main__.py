"""The entry point, of the console script and of ``python -m normsurgeon_cli`` (for launchers such as torchrun).

Signals are taken care of before anything else is imported.
"""

from normsurgeon_cli import stops


def main() -> None:
    """Run the command line."""
    stops.end_at_signals()
    from normsurgeon_cli.app import main as run

    try:
        run()
    except SystemExit as end:
        stops.done(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
        raise


if __name__ == "__main__":
    main()
