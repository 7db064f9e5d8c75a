"""Which norm to take, where, and at what price."""
