"""Training engines, one a file, in a folder for each family."""
