"""Run a model, capture what its layers put out, and score it."""
