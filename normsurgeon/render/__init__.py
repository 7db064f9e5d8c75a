"""A document becomes text, a terminal's output, a page or a notebook cell; nothing here knows what it is about."""
