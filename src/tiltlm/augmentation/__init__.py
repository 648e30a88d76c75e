"""More rows from few: augmentation of preferences and demonstrations that leaves the label as it was."""

from tiltlm.augmentation.augment import Augmentation, augment
from tiltlm.augmentation.pairs import CrossPromptNegatives, FormatCounterfactual, LabelSwap, LengthCounterfactual
from tiltlm.augmentation.translation import BackTranslation
from tiltlm.augmentation.words import DeleteWords, ReplaceWords, SwapWords

__all__ = [
    "Augmentation",
    "BackTranslation",
    "CrossPromptNegatives",
    "DeleteWords",
    "FormatCounterfactual",
    "LabelSwap",
    "LengthCounterfactual",
    "ReplaceWords",
    "SwapWords",
    "augment",
]
