"""Helpers that every room shares, without torch."""
