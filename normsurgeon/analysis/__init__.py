"""What a network does, measured: statistics, similarity and sensitivity of its layers."""
