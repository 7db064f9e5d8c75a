"""The parts of benchmarks/trainability.py."""
