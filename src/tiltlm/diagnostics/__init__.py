"""What can be said of a target and of a sampler, from samples: frontier, certificate, degeneracy."""
