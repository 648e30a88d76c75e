"""Summarisation: from a Debian package's long description to its short one."""

from tiltlm.data.descriptions import LICENCE, summaries
from tiltlm.data.sources import AptList
from tiltlm.data.spec import DataSet
from tiltlm.data.split import linked

SET = DataSet(
    task="summarisation",
    what="A Debian package's long description of 20 to 90 words, and its short one.",
    licence=LICENCE,
    sources=(AptList("en"),),
    columns={"prompt": "long description", "reference": "short description", "package": "the package's name"},
    content=("prompt", "reference"),
    split="by content: rows that share either side, or whose long sides share half of their word trigrams, are in one split",
    rows=summaries,
    groups=linked(("prompt", "reference"), near={"prompt": 0.5}),
)
