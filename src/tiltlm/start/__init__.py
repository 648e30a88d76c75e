"""Supervised starts: small models from scratch, where no pretrained one can be installed.

`train_start("translation", train, validation)` trains one in minutes, stops early so that there is room to improve, and gives the
folder; `tiltlm start` is the same on the command line.
"""

from __future__ import annotations

from tiltlm.start.catalogue import STARTS, Start
from tiltlm.start.supervised import Started, read_start, train_start
from tiltlm.start.training import Schedule

__all__ = ["STARTS", "Schedule", "Start", "Started", "read_start", "train_start"]
