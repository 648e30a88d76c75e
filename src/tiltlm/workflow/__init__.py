"""From a recipe to a run folder: what the command line does, as functions."""
