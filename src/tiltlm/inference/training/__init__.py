"""Training engines, one a file."""
