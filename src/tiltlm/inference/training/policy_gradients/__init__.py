"""Policy gradients: the KL-penalised reward, ascended by its own gradient."""
