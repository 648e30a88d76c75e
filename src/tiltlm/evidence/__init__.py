"""What is known about a text, as log-likelihoods r / beta."""

from tiltlm.evidence.reward import Reward

__all__ = ["Reward"]
