"""Helpers that every folder shares, without torch."""
