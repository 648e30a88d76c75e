"""Preferences: pairs of completions, one of them better."""
