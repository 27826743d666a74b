"""ModelSpec: what a model is, read from its raw config.json. The one source for models, memory, sim and plan.

Never AutoConfig: it imports torch, and a laptop that only plans a deployment has no need of it.
"""

from llmtool.modelspec.encoder import EncoderSpec, HeadSpec
from llmtool.modelspec.parts import (
    AttentionSpec,
    DenseSpec,
    GateSpec,
    LatentSpec,
    LayerSpec,
    Mamba2Spec,
    MixerSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    ShortConvSpec,
)
from llmtool.modelspec.pooling import PoolingSpec
from llmtool.modelspec.spec import DTYPE_BYTES, ModelSpec

__all__ = [
    "AttentionSpec",
    "DTYPE_BYTES",
    "DenseSpec",
    "EncoderSpec",
    "GateSpec",
    "HeadSpec",
    "LatentSpec",
    "LayerSpec",
    "Mamba2Spec",
    "MixerSpec",
    "ModelSpec",
    "MoESpec",
    "NormSpec",
    "PoolingSpec",
    "RopeSpec",
    "RouterSpec",
    "ShortConvSpec",
]
