"""What a batch norm is and how to read it; which norms can take its place."""
