"""``python -m normsurgeon_cli``: the same as the console script, for launchers such as torchrun."""

from normsurgeon_cli.app import main

if __name__ == "__main__":
    main()
