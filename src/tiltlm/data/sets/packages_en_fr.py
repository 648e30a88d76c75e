"""English to French, short and technical: Debian's package descriptions."""

from tiltlm.data.descriptions import translations

SET = translations("fr", "French")
