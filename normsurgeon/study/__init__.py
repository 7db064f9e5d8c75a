"""The comparison experiment: a grid of settings is trained, tested, stored and compared."""
