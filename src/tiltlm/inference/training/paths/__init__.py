"""Path consistency: what holds on every path of the posterior, squared."""
