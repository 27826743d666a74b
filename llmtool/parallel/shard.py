"""Shard: the part of a model that one rank holds, as ranges of heads, neurons, experts and vocabulary, and the
ModelSpec of that part.

Query heads go with the KV head they read: KV heads are dealt out as evenly as can be, and where they are fewer than
the ranks each is repeated, and its query heads are dealt out among those who hold it. Layers of a pruned model may
have fewer heads than there are ranks: the last ranks then have none there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmtool.errors import UsageError
from llmtool.modelspec import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    Mamba2Spec,
    MixerSpec,
    ModelSpec,
    MoESpec,
    ShortConvSpec,
)
from llmtool.parallel.mesh import Mesh, Place, split

UNITS = (
    64,
    32,
    16,
    8,
    4,
    2,
)  # neurons that stay together if they can: groups of quantised columns, panels of rows
NONE = range(0)


@dataclass(frozen=True, slots=True)
class LayerShard:
    """What a rank holds of a layer; everything as ranges of the whole layer's numbers. heads, kv_heads: of
    attention. owns_kv: no rank before it holds the same KV heads. neurons: of a dense MLP, or of each expert.
    experts: those that are here. shared: neurons of the shared expert. mixer_heads, mixer_groups: of a state
    space; channels: of a short convolution, as mixer_heads."""

    heads: range = NONE
    kv_heads: range = NONE
    owns_kv: bool = True
    neurons: range = NONE
    experts: range = NONE
    shared: range = NONE
    mixer_heads: range = NONE
    mixer_groups: range = NONE


@dataclass(frozen=True, slots=True)
class Shard:
    """whole: the model; layers: the rank's, and spec: of what it holds of them, layers numbered from 0. embedding,
    head: rows of the vocabulary, none where the stage has no use for them."""

    mesh: Mesh
    place: Place
    whole: ModelSpec
    layers: range
    spec: ModelSpec
    parts: tuple[LayerShard, ...]
    embedding: range
    head: range

    @property
    def first(self) -> bool:
        """Whether it is of the first stage, which reads tokens."""
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        """Whether it is of the last stage, which has logits."""
        return self.layers.stop == self.whole.num_layers

    @property
    def leads(self) -> bool:
        """Whether what must be added once in a stage (biases of what is summed) is added here."""
        return self.place.tensor == 0

    def mixes(self, i: int) -> bool:
        """Whether layer i (of the rank's) has attention or a state anywhere in the stage, and so a sum after it."""
        layer = self.whole.layers[self.layers[i]]
        return layer.mixer is not None or self.whole.attention_of(layer).num_heads > 0

    @property
    def exchanges(self) -> bool:
        """Whether tokens go to where their experts are, instead of experts' sums to where the tokens are."""
        return self.mesh.ep > 1 and self.mesh.ep == self.mesh.tp


def shard_of(whole: ModelSpec, mesh: Mesh, rank: int) -> Shard:
    """Raises UsageError for a mesh that the model does not divide over."""
    check(whole, mesh)
    place = mesh.place(rank)
    layers = mesh.stage_layers(whole.num_layers)[place.stage]
    parts = tuple(_layer(whole, whole.layers[i], mesh, place) for i in layers)
    vocabulary = split(whole.vocab_size, mesh.tp)[place.tensor]
    first, last = place.stage == 0, place.stage == mesh.pp - 1
    whole_heads = split_heads(whole.attention.num_heads, whole.attention.num_kv_heads, mesh.tp, place.tensor)
    spec = replace(
        whole,
        layers=tuple(
            _layer_spec(whole, whole.layers[i], part) for i, part in zip(layers, parts, strict=True)
        ),
        attention=_attention_spec(whole.attention, *whole_heads[:2]),
        tied_embeddings=whole.tied_embeddings and first and last,
    )
    return Shard(
        mesh, place, whole, layers, spec, parts, vocabulary if first else NONE, vocabulary if last else NONE
    )


def check(whole: ModelSpec, mesh: Mesh) -> None:
    """Raises UsageError, with the numbers, for a mesh that the model does not divide over."""
    mesh.stage_layers(whole.num_layers)
    experts = {layer.mlp.router.num_experts for layer in whole.layers if isinstance(layer.mlp, MoESpec)}
    if mesh.ep > 1 and not experts:
        raise UsageError(f"{whole.architecture} has no experts.", "Leave out --enable-expert-parallel.")
    if mesh.ep > 1 and min(experts) < mesh.ep:
        raise UsageError(f"{min(experts)} experts are too few for {mesh.ep} ranks of expert parallelism.")
    sizes = {"heads": whole.attention.num_heads, "tokens in its vocabulary": whole.vocab_size}
    shared = [layer.mlp.shared_size for layer in whole.layers if isinstance(layer.mlp, MoESpec)]
    if any(shared):
        sizes["neurons in its shared expert"] = min(size for size in shared if size)
    for what, count in sizes.items():
        if count < mesh.tp:
            raise UsageError(
                f"The model has {count} {what}, too few for a tensor parallel size of {mesh.tp}.",
                f"Set --tensor-parallel-size to {count} or less.",
            )
    if mesh.tp > 1 and any(layer.mixer is not None for layer in whole.layers):
        for layer in whole.layers:
            mixer = layer.mixer
            few = mixer is not None and (
                mixer.channels if isinstance(mixer, ShortConvSpec) else mixer.num_heads
            )
            if mixer is not None and few < mesh.tp:
                raise UsageError(
                    f"Its layers with a state have {few} heads, too few for a tensor parallel size of {mesh.tp}."
                )


def split_heads(heads: int, kv_heads: int, parts: int, index: int) -> tuple[range, range, bool]:
    """(query heads, KV heads, whether no part before has the same KV heads) of one part."""
    if not heads:
        return NONE, NONE, True
    group = heads // kv_heads
    if kv_heads >= parts:
        kv = split(kv_heads, parts)[index]
        return range(kv.start * group, kv.stop * group), kv, True
    holders = split(parts, kv_heads)
    head = next(h for h, who in enumerate(holders) if index in who)
    mine = split(group, len(holders[head]))[index - holders[head].start]
    if not mine:
        return NONE, NONE, False
    queries = range(head * group + mine.start, head * group + mine.stop)
    return queries, range(head, head + 1), index == holders[head].start


def split_neurons(count: int, parts: int, index: int) -> range:
    """Neurons of one part, in units that suit kernels where these divide as evenly as single ones."""
    even = next((u for u in UNITS if count % (u * parts) == 0), None)
    unit = even or next((u for u in UNITS if count % u == 0 and count // u >= 8 * parts), 1)
    units = split(count // unit, parts)[index]
    return range(units.start * unit, units.stop * unit)


def _layer(whole: ModelSpec, layer: LayerSpec, mesh: Mesh, place: Place) -> LayerShard:
    a, tp, i = whole.attention_of(layer), mesh.tp, place.tensor
    if a.latent is not None:  # all heads read the one cached row, which everyone keeps
        heads = split(a.num_heads, tp)[i]
        kv, owns = (range(a.num_kv_heads) if heads else NONE), i == 0
    else:
        heads, kv, owns = split_heads(a.num_heads, a.num_kv_heads, tp, i)
    part = LayerShard(heads, kv, owns)
    if isinstance(layer.mlp, DenseSpec):
        part = replace(part, neurons=split_neurons(layer.mlp.intermediate_size, tp, i))
    else:
        moe = layer.mlp
        part = replace(
            part,
            experts=split(moe.router.num_experts, mesh.ep)[place.expert_group],
            neurons=split_neurons(moe.intermediate_size, mesh.expert_tp, place.expert_part),
            shared=split_neurons(moe.shared_size, tp, i),
        )
    if isinstance(layer.mixer, ShortConvSpec):
        return replace(part, mixer_heads=split(layer.mixer.channels, tp)[i])
    if layer.mixer is not None:
        mine, groups, _ = split_heads(layer.mixer.num_heads, layer.mixer.num_groups, tp, i)
        return replace(part, mixer_heads=mine, mixer_groups=groups)
    return part


def _layer_spec(whole: ModelSpec, layer: LayerSpec, part: LayerShard) -> LayerSpec:
    attention = _attention_spec(whole.attention_of(layer), part.heads, part.kv_heads)
    return replace(layer, attention=attention, mlp=_mlp_spec(layer, part), mixer=_mixer(layer.mixer, part))


def _attention_spec(a: AttentionSpec, heads: range, kv_heads: range) -> AttentionSpec:
    kv = a.num_kv_heads if a.latent is not None and heads else len(kv_heads)
    return replace(a, num_heads=len(heads), num_kv_heads=kv)


def _mlp_spec(layer: LayerSpec, part: LayerShard) -> DenseSpec | MoESpec:
    if isinstance(layer.mlp, DenseSpec):
        return replace(layer.mlp, intermediate_size=len(part.neurons))
    return replace(
        layer.mlp,
        intermediate_size=len(part.neurons),
        shared_size=len(part.shared),
        shared_gate=layer.mlp.shared_gate and len(part.shared) > 0,
        held=(part.experts.start, part.experts.stop),
    )


def _mixer(mixer: MixerSpec | None, part: LayerShard) -> MixerSpec | None:
    if isinstance(mixer, ShortConvSpec):
        return replace(mixer, channels=len(part.mixer_heads))
    if isinstance(mixer, Mamba2Spec):
        if not part.mixer_heads:
            return None
        return replace(mixer, num_heads=len(part.mixer_heads), num_groups=len(part.mixer_groups))
    return None
