"""normsurgeon inspect: the norm sites of a model, as a table."""

from __future__ import annotations

from typing import Annotated

import typer

from normsurgeon_cli import options
from normsurgeon_cli.console import out, print_json, print_message, print_table, status
from normsurgeon_cli.network import Network, takes_network

EXAMPLES = ("normsurgeon inspect resnet50", "normsurgeon inspect torchvision:mobilenet_v2 --json")


@takes_network
def inspect(
    *,
    network: Network,
    # What it does anyway: taken, since the other commands have taught people to say it.
    random_init: Annotated[bool, typer.Option("--random-init", hidden=True)] = False,
    input_shape: options.InputShape = None,
    json: options.Json = False,
) -> None:
    """List every norm layer of MODEL: its class, what feeds it, and whether that can absorb the whitening.

    The structure does not depend on the weights, so none are downloaded.
    """
    import normsurgeon as ns

    example = options.example_inputs(input_shape)
    model = network.model
    made = network.load(random_init=network.weights is None)
    with status(f"following {model} …"):
        inventory = ns.inspect(made, name=model, example_inputs=example)
    if json:
        print_json(inventory.to_dict())
        return
    print_table(inventory.table)
    out().print(f"{model}: {inventory.summary()}", markup=False, soft_wrap=True)
    for note in inventory.notes:
        print_message(note)
