"""Records as pages and tables. Nothing here imports torch."""
