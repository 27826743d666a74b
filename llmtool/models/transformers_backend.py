"""Models that run through transformers' own code, with our paged attention in place of theirs.

For causal language models without a native family here. What such a model caches is measured by running it once,
and before it serves, what it says over pages, in chunks and beside another sequence, is compared with what its own
attention says: a model that keeps a state, or whose masks or positions are its own, is refused, and never wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from llmtool_kernels.attention import paged_attention
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmtool.errors import ModelError
from llmtool.models.decoder import KVContext
from llmtool.models.transformers_probe import (
    IMPLEMENTATION,
    AttentionCall,
    MeasuredSpec,
    compare,
    measure,
    measured_spec,
    refusal,
)


class TransformersDecoder:
    """A Decoder (llmtool.models.decoder) around a causal language model of transformers."""

    def __init__(self, model: Any, spec: MeasuredSpec) -> None:
        self.spec = spec
        self._body = body = model.get_decoder()
        path = next(name for name, module in model.named_modules() if module is body)
        self._head = _replaced(model, path.split("."), _Identity())
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.kv_scales: dict[int, tuple[float, float]] = {}  # its checkpoints bring none
        self.weight_bytes = sum(p.nbytes for p in model.parameters())

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv: KVContext, wanted: Tensor | None = None
    ) -> Tensor:
        out = self._body(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, llmtool_kv=kv
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden if wanted is None else hidden[wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.float()


def load_with_transformers(
    directory: Path, dtype: torch.dtype, device: torch.device, load_format: str = "auto", seed: int = 0
) -> TransformersDecoder:
    """Raises ModelError with the reason for a model that transformers cannot load or that cannot run over pages."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _paged)
    model = _load(directory, dtype, device, load_format, seed)
    with torch.inference_mode():
        try:
            calls = measure(model)
            decoder = TransformersDecoder(model, measured_spec(model, calls))
            compare(model, decoder)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
            raise refusal(model, f"its code fails over pages: {type(e).__name__}: {e}") from e
    return decoder


# -- attention ---------------------------------------------------------------------------------------------------


def _paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    llmtool_kv: KVContext | Callable[[AttentionCall], None] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, N, D] -> [1, N, heads, D]. llmtool_kv: the step's memory; or,
    to measure, who is told of the call."""
    call = _call(module, query, key, value, scaling, sliding_window)
    if llmtool_kv is None:
        raise ModelError(
            f"{type(module).__name__} does not run here: it has no native family, and its code does not hand on to "
            "attention what its model is given, as paged attention needs."
        )
    if not isinstance(llmtool_kv, KVContext):
        llmtool_kv(call)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    arena, layout, batch = llmtool_kv.layer(call.layer)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [N, heads, D]
    out = paged_attention(
        q, k, v, arena, layout, batch, call.scale, call.window, softcap=softcap, sinks=s_aux
    )
    return out[None], None


def _call(
    module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
) -> AttentionCall:
    config, layer = module.config, module.layer_idx
    types = getattr(config, "layer_types", None)
    if sliding_window is None and types is not None and types[layer] == "sliding_attention":
        sliding_window = config.sliding_window
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return AttentionCall(
        layer,
        query.shape[1],
        key.shape[1],
        key.shape[3],
        value.shape[3],
        float(scale),
        sliding_window or None,
    )


# -- loading -----------------------------------------------------------------------------------------------------


def _load(directory: Path, dtype: torch.dtype, device: torch.device, load_format: str, seed: int) -> Any:
    auto = transformers.AutoModelForCausalLM
    try:
        if load_format == "dummy":
            config = transformers.AutoConfig.from_pretrained(directory)
            torch.manual_seed(seed)
            model, info = auto.from_config(config, dtype=dtype, attn_implementation="eager"), {}
        else:
            model, info = auto.from_pretrained(
                directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as e:
        raise ModelError(
            f"The model in {directory} runs neither natively nor through transformers: {_first_line(e)}",
            "Check its config.json, or install a transformers release that knows its architecture.",
        ) from e
    problems = [
        f"{what}: {', '.join(sorted(map(str, names))[:8])}"
        for what, names in (
            ("missing", info.get("missing_keys")),
            ("wrong shape", info.get("mismatched_keys")),
        )
        if names
    ]
    if problems:
        raise ModelError(f"The weights in {directory} do not fit its config.json: {'; '.join(problems)}.")
    return model.eval().to(device)


def _replaced(module: Any, path: Sequence[str], new: nn.Module) -> Any:
    """The same module with another in the place of one inside it; all else is shared."""
    inner = new if len(path) == 1 else _replaced(module._modules[path[0]], path[1:], new)
    changed = copy.copy(module)
    changed._modules = {**module._modules, path[0]: inner}
    return changed


class _Identity(nn.Module):
    """In the place of a model's body, it leaves of the model what it does to hidden states: scaling and all."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


@dataclass
class _Output(BaseModelOutputWithPastAndCrossAttentions):
    """With every field that some head looks at."""

    router_logits: tuple[Tensor] | None = None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
