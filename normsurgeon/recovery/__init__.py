"""Bringing back what a conversion lost, with images and without labels."""
