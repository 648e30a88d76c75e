"""Decoding engines, one a file."""
