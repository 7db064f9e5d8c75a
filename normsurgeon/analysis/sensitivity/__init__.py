"""How much the loss cares about each layer, parameter tensor and norm setting."""
