"""Distribution matching: an f-divergence between policy and posterior, descended."""
