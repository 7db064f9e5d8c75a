"""Following a network: its data flow, and its norm layers as sites in it."""
