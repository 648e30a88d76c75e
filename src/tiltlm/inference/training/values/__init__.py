"""Value learning: what a text so far is worth, for a policy or a twist."""
