"""Readers of configurations, one format a file; each returns a `Reading`."""
