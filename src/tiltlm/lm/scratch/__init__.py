"""Small models from scratch, in the ordinary classes of transformers and in ordinary folders."""
