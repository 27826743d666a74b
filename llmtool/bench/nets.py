"""Nets for `llmtool bench --aot` and its benchmarks, with random weights: shapes are those of their papers.

Each has a size for measuring and a tiny one for tests. Steps are static: the decoder's KV lies in buffers that it
updates in place, the mixture runs every expert and weighs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Net:
    """module: in eval mode. inputs: for a batch. branchy: whether side branches are what it is here for."""

    module: nn.Module
    inputs: Callable[[int], tuple[Tensor, ...]]
    branchy: bool = False


# -- images ----------------------------------------------------------------------------------------------------


def conv(
    inp: int,
    out: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class Residual(nn.Module):
    def __init__(self, body: nn.Module, skip: nn.Module | None = None, act: bool = True) -> None:
        super().__init__()
        self.body, self.skip, self.act = body, skip, act

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + (x if self.skip is None else self.skip(x))
        return F.relu(y) if self.act else y


class Head(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def resnet(depths: Sequence[int], width: int, classes: int, stem_stride: int) -> nn.Module:
    """ResNet with bottlenecks (1512.03385); depths 3, 4, 6, 3 and width 64 are ResNet-50."""
    layers: list[nn.Module] = [conv(3, width, 7 if stem_stride > 1 else 3, stem_stride)]
    if stem_stride > 1:
        layers.append(nn.MaxPool2d(3, 2, 1))
    inp = width
    for stage, depth in enumerate(depths):
        inner = width << stage
        for i in range(depth):
            stride = 2 if i == 0 and stage else 1
            body = nn.Sequential(
                conv(inp, inner), conv(inner, inner, 3, stride), conv(inner, 4 * inner, act=None)
            )
            skip = conv(inp, 4 * inner, 1, stride, act=None) if i == 0 else None
            layers.append(Residual(body, skip))
            inp = 4 * inner
    return nn.Sequential(*layers, Head(inp, classes))


def inverted(
    inp: int, out: int, kernel: int, stride: int, expand: int, act: type[nn.Module], squeeze: bool
) -> nn.Module:
    inner = inp * expand
    layers = [conv(inp, inner, act=act)] if expand > 1 else []
    layers.append(conv(inner, inner, kernel, stride, inner, act))
    if squeeze:
        layers.append(Squeeze(inner, max(1, inp // 4)))  # type: ignore[arg-type]
    body = nn.Sequential(*layers, conv(inner, out, act=None))
    return Residual(body, act=False) if stride == 1 and inp == out else body


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


Stage = tuple[int, int, int, int, int]  # expand, width, depth, stride, kernel
MOBILENET: tuple[Stage, ...] = (
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3)),
    *((6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3)),
)  # 1801.04381, table 2
EFFICIENTNET: tuple[Stage, ...] = (
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
    *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)  # 1905.11946, table 1


def mobile(
    stages: Sequence[Stage],
    stem: int,
    last: int,
    classes: int,
    act: type[nn.Module],
    squeeze: bool,
    stem_stride: int,
) -> nn.Module:
    layers: list[nn.Module] = [conv(3, stem, 3, stem_stride, act=act)]
    inp = stem
    for expand, width, depth, stride, kernel in stages:
        for i in range(depth):
            layers.append(inverted(inp, width, kernel, stride if i == 0 else 1, expand, act, squeeze))
            inp = width
    return nn.Sequential(*layers, conv(inp, last, act=act), Head(last, classes))


class Inception(nn.Module):
    """A block of Inception-v3 (1512.00567, figure 5): four branches, joined by channels."""

    def __init__(self, inp: int, width: int) -> None:
        super().__init__()
        self.one = conv(inp, width)
        self.five = nn.Sequential(conv(inp, width * 3 // 4), conv(width * 3 // 4, width, 5))
        self.three = nn.Sequential(
            conv(inp, width), conv(width, width * 3 // 2, 3), conv(width * 3 // 2, width * 3 // 2, 3)
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(inp, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.five(x), self.three(x), self.pool(x)), 1)


def inception(blocks: int, width: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = [conv(3, width // 2, 3, 2), conv(width // 2, width, 3), nn.MaxPool2d(3, 2)]
    inp = width
    for i in range(blocks):
        layers.append(Inception(inp, width))
        inp = 4 * width
        if i == blocks // 2:
            layers.append(nn.MaxPool2d(3, 2))
    return nn.Sequential(*layers, Head(inp, classes))


def separable(width: int, kernel: int) -> nn.Sequential:
    """Twice relu, depthwise, pointwise, norm."""
    half = [
        nn.ReLU(),
        nn.Conv2d(width, width, kernel, 1, kernel // 2, groups=width, bias=False),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
    ]
    again = [nn.ReLU(), nn.Conv2d(width, width, kernel, 1, kernel // 2, groups=width, bias=False)]
    return nn.Sequential(*half, *again, nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))


class Cell(nn.Module):
    """NASNet-A's normal cell (1707.07012, figure 4): five sums of two branches of this input and the one before."""

    def __init__(self, here: int, before: int, width: int) -> None:
        super().__init__()
        self.here, self.before = conv(here, width), conv(before, width)
        self.convs = nn.ModuleList(separable(width, k) for k in (3, 3, 5, 5, 3))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        h, p = self.here(x), self.before(previous)
        a, b, c, d, e = self.convs
        pooled = F.avg_pool2d(p, 3, 1, 1)
        sums = (a(h) + h, b(p) + c(h), F.avg_pool2d(h, 3, 1, 1) + p, pooled + pooled, d(p) + e(p))
        return torch.cat((p, *sums), 1)


class NASNet(nn.Module):
    def __init__(self, cells: int, width: int, classes: int) -> None:
        super().__init__()
        self.stem = conv(3, width, 3, 2)
        widths = [width, width, *[6 * width] * cells]
        self.cells = nn.ModuleList(Cell(widths[i + 1], widths[i], width) for i in range(cells))
        self.head = Head(6 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        previous, here = x, x
        for cell in self.cells:
            previous, here = here, cell(here, previous)
        return self.head(here)


# -- language --------------------------------------------------------------------------------------------------


class EncoderLayer(nn.Module):
    """BERT's. heads and inner may be those that pruning left."""

    def __init__(self, hidden: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(hidden, heads * head_dim) for _ in range(3))
        self.o = nn.Linear(heads * head_dim, hidden)
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.o(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(
        self, layers: Sequence[tuple[int, int]], hidden: int, head_dim: int, vocab: int, length: int
    ) -> None:
        """layers: heads and inner size of each."""
        super().__init__()
        self.words, self.positions = nn.Embedding(vocab, hidden), nn.Embedding(length, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.layers = nn.ModuleList(EncoderLayer(hidden, h, head_dim, inner) for h, inner in layers)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(at))
        for layer in self.layers:
            x = layer(x)
        return x


class Mixture(nn.Module):
    """The top 2 of some experts, each a branch that always runs; its weight is 0 where it was not chosen."""

    def __init__(self, hidden: int, inner: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gates = nn.ModuleList(nn.Linear(hidden, inner, bias=False) for _ in range(experts))
        self.ups = nn.ModuleList(nn.Linear(hidden, inner, bias=False) for _ in range(experts))
        self.downs = nn.ModuleList(nn.Linear(inner, hidden, bias=False) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        top = self.router(x).softmax(-1).topk(2, -1)
        weights = torch.zeros_like(self.router(x)).scatter(-1, top.indices, top.values)
        parts = [
            down(F.silu(gate(x)) * up(x)) * weights[..., i : i + 1]
            for i, (gate, up, down) in enumerate(zip(self.gates, self.ups, self.downs, strict=True))
        ]
        return torch.stack(parts).sum(0)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nn.Module):
    """One new token a sequence: its key and value go into the cache in place, then all are read."""

    def __init__(self, shape: DecoderShape, batch: int) -> None:
        super().__init__()
        s = self.shape = shape
        self.norm1, self.norm2 = nn.RMSNorm(s.hidden, 1e-5), nn.RMSNorm(s.hidden, 1e-5)
        self.q = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k, self.v = (nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False) for _ in range(2))
        self.o = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.mlp = Mixture(s.hidden, s.inner, s.experts) if s.experts else SwiGLU(s.hidden, s.inner)
        cache = torch.zeros(batch, s.kv_heads, s.context, s.head_dim)
        self.register_buffer("keys", cache, persistent=False)
        self.register_buffer("values", cache.clone(), persistent=False)
        self.keys: Tensor
        self.values: Tensor

    def forward(self, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            p(y).unflatten(-1, (-1, self.shape.head_dim))[:, :, None] for p in (self.q, self.k, self.v)
        )
        self.keys.index_copy_(2, position, _turned(k, cos, sin))
        self.values.index_copy_(2, position, v)
        attended = F.scaled_dot_product_attention(
            _turned(q, cos, sin), self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        x = x + self.o(attended.flatten(1))
        return x + self.mlp(self.norm2(x))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """experts: 0 for a dense MLP. context: places in the KV cache."""

    hidden: int = 576
    inner: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    layers: int = 30
    vocab: int = 49152
    context: int = 512
    experts: int = 0
    theta: float = 1e4


class Decoder(nn.Module):
    """A decoding step of Llama's kind: token ids [B], all at position [1], to logits [B, vocab]."""

    def __init__(self, shape: DecoderShape, batch: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(DecoderLayer(shape, batch) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, 1e-5)
        freq = shape.theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.register_buffer("freq", freq, persistent=False)
        self.register_buffer("places", torch.arange(shape.context), persistent=False)
        self.freq: Tensor
        self.places: Tensor

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        x = self.embedding(ids)
        angle = position.float() * self.freq.float()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = (self.places <= position)[None, None, None]
        for layer in self.layers:
            x = layer(x, position, cos, sin, mask)
        return F.linear(self.norm(x), self.embedding.weight)


# -- by name ---------------------------------------------------------------------------------------------------

NETS = (
    *("bert", "distilbert", "pruned-bert", "decoder", "decoder-0.6b", "moe"),
    *("resnet", "mobilenet", "efficientnet", "inception", "nasnet", "mlp"),
)


def build(name: str, batch: int = 1, tiny: bool = False, cifar: bool = False, seed: int = 0) -> Net:
    """The net of this name, for this batch where it keeps a state. tiny: for tests. cifar: images of 32 x 32 and
    ten classes, as the seed's training table has them. Raises KeyError for a name that is none of NETS."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in ("decoder", "decoder-0.6b", "moe"):
            return _decoder(name, batch, tiny)
        if name in ("bert", "distilbert", "pruned-bert"):
            return _encoder(name, tiny)
        if name == "mlp":
            blocks = [m for _ in range(6) for m in (nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32))]
            return Net(nn.Sequential(*blocks).eval(), lambda b: (torch.randn(b, 32),))
        return _image(name, tiny, cifar)


def _decoder(name: str, batch: int, tiny: bool) -> Net:
    experts = 0 if name != "moe" else 4 if tiny else 8
    if tiny:
        shape = DecoderShape(32, 64, 4, 2, 8, 2, 101, 16, experts)
    elif experts:
        shape = DecoderShape(layers=8, inner=768, experts=experts)
    elif name == "decoder-0.6b":  # Qwen3-0.6B's
        shape = DecoderShape(1024, 3072, 16, 8, 128, 28, 151936)
    else:
        shape = DecoderShape()
    position = torch.tensor([shape.context // 2])
    return Net(
        Decoder(shape, batch).eval(),
        lambda b: (torch.arange(b) * 7 % shape.vocab, position),
        name == "moe",
    )


def _encoder(name: str, tiny: bool) -> Net:
    depth = 2 if tiny else 6 if name == "distilbert" else 12
    heads, hidden, head_dim, inner = (4, 32, 8, 64) if tiny else (12, 768, 64, 3072)
    layers = [(heads, inner)] * depth
    if name == "pruned-bert":  # half of all, more of it from the later layers
        layers = [
            (max(1, heads * k // (4 * depth)), inner * k // (4 * depth)) for k in range(3 * depth, depth, -2)
        ]
    vocab, length = (101, 16) if tiny else (30522, 128)
    module = Encoder(layers, hidden, head_dim, vocab, length).eval()
    return Net(module, lambda b: (torch.randint(vocab, (b, length)),))


def _image(name: str, tiny: bool, cifar: bool) -> Net:
    side = 32 if tiny or cifar else 224
    classes = 10 if tiny or cifar else 1000
    stem = 1 if tiny or cifar else 2
    if name == "resnet":
        module = resnet((1, 1) if tiny else (3, 4, 6, 3), 8 if tiny else 64, classes, stem)
    elif name == "mobilenet":
        stages = MOBILENET[:2] if tiny else MOBILENET
        module = mobile(stages, 8 if tiny else 32, 32 if tiny else 1280, classes, nn.ReLU6, False, stem)
    elif name == "efficientnet":
        stages = EFFICIENTNET[:2] if tiny else EFFICIENTNET
        module = mobile(stages, 8 if tiny else 32, 32 if tiny else 1280, classes, nn.SiLU, True, stem)
    elif name == "inception":
        module = inception(2 if tiny else 9, 8 if tiny else 64, classes)
    elif name == "nasnet":
        module = NASNet(2 if tiny else 12, 4 if tiny else 44, classes)
    else:
        raise KeyError(name)
    return Net(module.eval(), lambda b: (torch.randn(b, 3, side, side),), name in ("inception", "nasnet"))
