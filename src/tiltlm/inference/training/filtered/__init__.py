"""Filtered fine-tuning: maximum likelihood on completions that were chosen."""
