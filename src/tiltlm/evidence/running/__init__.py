"""Running a user's function safely: layers around it that batch, keep, retry, and isolate its calls."""

from tiltlm.evidence.running.cache import Cached
from tiltlm.evidence.running.coroutines import concurrently
from tiltlm.evidence.running.isolated import Isolated
from tiltlm.evidence.running.layers import TRANSIENT, Batched, Retried
from tiltlm.evidence.running.safely import safely
from tiltlm.evidence.running.tally import Tally, counting

__all__ = ["TRANSIENT", "Batched", "Cached", "Isolated", "Retried", "Tally", "concurrently", "counting", "safely"]
