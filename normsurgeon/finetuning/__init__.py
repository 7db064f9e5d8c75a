"""Training a converted network: objectives, the loop, and what looks after a long run."""
