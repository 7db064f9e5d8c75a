"""normsurgeon demo."""
def demo() -> None:
    """See it work: real ImageNet weights, photographs, four conversions."""
