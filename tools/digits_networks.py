"""The networks behind the shipped models: a residual CNN and a pre-norm vision transformer.

The norm of the transformer is an argument, so that twins differ in nothing else. They are small,
but each holds the structures that quantization has to cope with: residual sums, BatchNorm, a
depthwise convolution, ReLU6; LayerNorm, GELU, attention of activation by activation.
"""

# mypy: disallow-subclassing-any=False
# (torch is untyped to mypy here, see pyproject.toml, so nn.Module counts as Any.)

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

CLASSES = 10


class ConvNorm(nn.Sequential):
    """Convolution without bias, BatchNorm, and an activation where one is given."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: nn.Module | None = None,
    ) -> None:
        """Build the layers; padding keeps the size at stride 1."""
        conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        layers = [conv, nn.BatchNorm2d(outputs)]
        super().__init__(*layers, *([activation] if activation is not None else []))


class Residual(nn.Module):
    """Two 3x3 convolutions and a skip path, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        """Build both paths."""
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(inputs, outputs, stride=stride, activation=nn.ReLU()),
            ConvNorm(outputs, outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else ConvNorm(inputs, outputs, kernel=1, stride=stride)
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y: torch.Tensor = self.activation(self.body(x) + self.skip(x))
        return y


class DigitsCNN(nn.Module):
    """Stem, two residual blocks, a depthwise-separable block, pooling, a linear classifier."""

    def __init__(self) -> None:
        """Build the network: 32 channels on 8x8, 64 and 128 on 4x4."""
        super().__init__()
        self.stem = ConvNorm(1, 32, activation=nn.ReLU())
        self.blocks = nn.Sequential(Residual(32, 32), Residual(32, 64, stride=2))
        self.separable = nn.Sequential(
            ConvNorm(64, 64, groups=64, activation=nn.ReLU6()),
            ConvNorm(64, 128, kernel=1, activation=nn.ReLU6()),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map (batch, 1, 8, 8) to logits (batch, 10)."""
        features = self.separable(self.blocks(self.stem(image)))
        logits: torch.Tensor = self.head(self.pool(features).flatten(1))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention written out, so that exporters give MatMul, Softmax, MatMul."""

    def __init__(self, width: int, heads: int) -> None:
        """Build the joint projection to queries, keys, values, and the output projection."""
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens, width) to the same shape."""
        _, tokens, width = x.shape
        q, k, v = (
            part.reshape(-1, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        weights = torch.softmax((q * self.scale) @ k.transpose(-2, -1), dim=-1)
        mixed = (weights @ v).transpose(1, 2).reshape(-1, tokens, width)
        y: torch.Tensor = self.proj(mixed)
        return y


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(
        self, width: int, heads: int, *, expansion: int, norm: Callable[[int], nn.Module]
    ) -> None:
        """Build attention and a perceptron of `expansion` times the width."""
        super().__init__()
        self.norm1 = norm(width)
        self.attention = Attention(width, heads)
        self.norm2 = norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        y: torch.Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """Patches, a class token, blocks, a linear classifier; the defaults are those for digits.

    Digits: patches of 2x2 of an 8x8 image, 16 tokens and the class token, four blocks.
    """

    def __init__(
        self,
        *,
        size: int = 8,
        patch: int = 2,
        colours: int = 1,
        width: int = 64,
        heads: int = 4,
        depth: int = 4,
        expansion: int = 2,
        classes: int = CLASSES,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        """Build the network; tokens and positions start small and random."""
        super().__init__()
        tokens = (size // patch) ** 2 + 1
        self.patches = nn.Conv2d(colours, width, patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, expansion=expansion, norm=norm) for _ in range(depth))
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map (batch, colours, size, size) to logits (batch, classes)."""
        patches = self.patches(image).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.position
        logits: torch.Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits
