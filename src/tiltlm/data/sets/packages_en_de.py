"""English to German, short and technical: Debian's package descriptions."""

from tiltlm.data.descriptions import translations

SET = translations("de", "German")
