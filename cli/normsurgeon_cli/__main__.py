"""The entry point, of the console script and of ``python -m normsurgeon_cli`` (for launchers such as torchrun).

Signals are taken care of before anything else is imported.
"""

from normsurgeon_cli import stops


def main() -> None:
    """Run the command line, and leave with its exit code."""
    stops.end_at_signals()
    from normsurgeon_cli import streams

    streams.make_patient()
    from normsurgeon_cli.app import main as run

    code = run()
    stops.done(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
