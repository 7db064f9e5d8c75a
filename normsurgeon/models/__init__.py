"""A name or a file becomes a model, and back."""
