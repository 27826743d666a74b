"""The torch executor of encoders: one batch of whole sequences in, a vector of each out. And how an engine with it
is put together from settings (`build_pooling`)."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llmtool.config import EngineConfig, SchedulerConfig
from llmtool.core.pooling import PoolingBatch, PoolingRequest, PoolingResult
from llmtool.errors import UsageError
from llmtool.models.encoder import NativeEncoder, attention_groups, pool
from llmtool.models.encoder_weights import load_weights
from llmtool.models.resolve import resolve
from llmtool.modelspec import EncoderSpec, PoolingSpec
from llmtool.runtime.device import pick_device, pick_dtype, set_threads
from llmtool.runtime.parts import EngineInfo, PoolingInfo, PoolingParts, Progress

# A step is long enough to keep the linear layers busy and short enough for the next request not to wait for it.
STEP_TOKENS = 1024


class EncoderExecutor:
    """Runs steps on a `NativeEncoder`.

    With a classification head a sequence's vector is its labels' probabilities, else its pooled embedding. Token
    ids outside the vocabulary and vectors that are not numbers are errors of their sequence alone.
    """

    def __init__(self, model: NativeEncoder, pooling: PoolingSpec) -> None:
        self.model = model
        self.pooling = pooling

    def run(self, batch: PoolingBatch) -> PoolingResult:
        started = time.perf_counter()
        with torch.inference_mode():
            vectors, errors = self._run(batch.requests)
        return PoolingResult(vectors, errors, time.perf_counter() - started)

    def warmup(self) -> None:
        """One short step, so that the first request finds libraries loaded and buffers allocated."""
        request = PoolingRequest("warmup", 0, [0] * 8, 0, 0.0, (0, 0.0, "", 0))
        self.run(PoolingBatch(-1, [request], 8))

    def _run(self, requests: list[PoolingRequest]) -> tuple[list[bytes], dict[int, str]]:
        model, device = self.model, self.model.device
        lengths = np.array([len(r.token_ids) for r in requests])
        ends = lengths.cumsum()
        ids = np.fromiter((token for r in requests for token in r.token_ids), np.int64, int(ends[-1]))
        errors = self._wrong_tokens(ids, ends)
        begins = np.repeat(ends - lengths, lengths)  # [N], where each token's sequence begins
        positions = np.arange(len(ids)) - begins
        hidden = model.forward(
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions).to(device),
            _token_types(requests, lengths, positions, device) if model.spec.token_types > 1 else None,
            attention_groups(lengths.tolist(), device),
        )  # [N, hidden]
        sizes = torch.from_numpy(lengths).to(device)
        if model.spec.head is not None:
            logits = model.classify(pool_first(hidden, sizes))
            vectors = torch.sigmoid(logits) if model.spec.head.independent else logits.softmax(-1)
        else:
            vectors = pool(hidden, sizes, self.pooling.modes)
            if self.pooling.normalize:
                vectors = F.normalize(vectors)
        rows = vectors.cpu().numpy()  # float32 [S, size]
        for i in np.flatnonzero(~np.isfinite(rows).all(1)).tolist():
            errors.setdefault(i, "The model's output for this input is not numbers (NaN or infinite).")
        return [row.tobytes() for row in rows], errors

    def _wrong_tokens(self, ids: np.ndarray, ends: np.ndarray) -> dict[int, str]:
        """Sequences with token ids that there are none of; the ids become 0."""
        wrong = (ids < 0) | (ids >= self.model.spec.vocab_size)
        if not wrong.any():
            return {}
        at = np.flatnonzero(wrong)
        errors = {
            int(i): f"Token id {ids[place]} is not in the model's vocabulary of {self.model.spec.vocab_size}."
            for i, place in zip(np.searchsorted(ends, at, side="right"), at, strict=True)
        }
        ids[wrong] = 0
        return errors


def pool_first(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The first token's hidden state of each sequence, [S, hidden] of [N, hidden]."""
    return hidden[lengths.cumsum(0) - lengths]


def _token_types(
    requests: list[PoolingRequest], lengths: np.ndarray, positions: np.ndarray, device: torch.device
) -> torch.Tensor | None:
    """int64 [N]: 1 from where the second text of a pair begins. None where there are no pairs."""
    if not any(r.segment for r in requests):
        return None
    # A single text has no second one: it would begin where no token is.
    segments = np.array([r.segment or len(r.token_ids) for r in requests])
    return torch.from_numpy((positions >= np.repeat(segments, lengths)).astype(np.int64)).to(device)


def build_pooling(config: EngineConfig, directory: Path, progress: Progress) -> PoolingParts:
    """Load the encoder in `directory` and warm up. Raises ModelError, UsageError."""
    _check_flags(config)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    num_threads = set_threads(config.num_threads)
    spec = EncoderSpec.from_dir(directory)
    pooling = PoolingSpec.from_dir(directory)
    scheduler = _limits(config, spec, pooling)
    weights = load_weights(
        spec,
        directory,
        dtype,
        device,
        lambda done, total: progress("Loading weights", done / total if total else 1.0),
        config.load_format,
        config.seed,
    )
    executor = EncoderExecutor(NativeEncoder(spec, weights), pooling)
    progress("Warming up", 1.0)
    executor.warmup()
    tokenizer = directory if config.tokenizer is None else Path(config.tokenizer).expanduser()
    if config.tokenizer is not None and not tokenizer.is_dir():
        tokenizer = resolve(config.tokenizer, config.revision)
    return PoolingParts(
        executor,
        scheduler,
        EngineInfo(
            model=config.model,
            served_model_name=config.served_model_name or config.model,
            tokenizer_dir=str(tokenizer),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=scheduler.max_model_len,
            vocab_size=spec.vocab_size,
            eos_token_ids=(),
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_waiting=scheduler.max_waiting,
            num_pages=0,
            tokens_per_page=0,
            page_bytes=0,
            host_pages=0,
            num_parameters=spec.num_parameters,
            weight_bytes=spec.num_parameters * dtype.itemsize,
            activation_bytes=activation_bytes(spec, dtype.itemsize, scheduler.max_num_batched_tokens),
            num_threads=num_threads,
            pooling=_describe(spec, pooling),
        ),
    )


_NO_CACHE = "An encoder caches no keys and values"
# Settings that change nothing here -> why, and their flags.
_WITHOUT_EFFECT = {
    "step_log": ("Steps of an encoder are not recorded", "--step-log"),
    "quantization": ("Weights of an encoder are not quantized", "--quantization"),
    "kv_cache_dtype": (_NO_CACHE, "--kv-cache-dtype"),
    "block_size": (_NO_CACHE, "--block-size"),
    "kv_cache_memory_bytes": (_NO_CACHE, "--kv-cache-memory"),
    "gpu_memory_utilization": (_NO_CACHE, "--gpu-memory-utilization"),
    "swap_space_bytes": (_NO_CACHE, "--swap-space"),
    "preemption": ("An encoder runs each input whole and preempts none", "--preemption"),
}


def _check_flags(config: EngineConfig) -> None:
    """Raises UsageError for a setting that was changed and would be ignored."""
    for setting in fields(EngineConfig):
        value = getattr(config, setting.name)
        if setting.name in _WITHOUT_EFFECT and value != setting.default:
            why, flag = _WITHOUT_EFFECT[setting.name]
            raise UsageError(f"{why}, so {setting.name} cannot be {value!r}.", f"Leave out {flag}.")


def activation_bytes(spec: EncoderSpec, dtype_bytes: int, max_num_batched_tokens: int) -> int:
    """An estimate of what a step needs beside the weights, from above: per token the residual stream, queries, keys
    and values with their padded copies, and the MLP's inner row before and after its activation."""
    per_token = 4 * spec.hidden_size + 8 * spec.hidden_size + 2 * spec.intermediate_size
    return max_num_batched_tokens * per_token * dtype_bytes


def _limits(config: EngineConfig, spec: EncoderSpec, pooling: PoolingSpec) -> SchedulerConfig:
    """The model's own length is what sentence-transformers cuts at; up to all its positions can be asked for."""
    length = config.max_model_len or min(pooling.max_length or spec.max_positions, spec.max_positions)
    if length > spec.max_positions:
        raise UsageError(
            f"max_model_len is {length}, but the model was made for {spec.max_positions} tokens.",
            f"Set --max-model-len to {spec.max_positions} or less.",
        )
    budget = (
        max(STEP_TOKENS, length) if config.max_num_batched_tokens is None else config.max_num_batched_tokens
    )
    if budget < length:
        raise UsageError(
            f"max_num_batched_tokens ({budget}) must hold a whole sequence of {length} tokens: an encoder reads it "
            "at once.",
            f"Raise it, or set --max-model-len to {budget} or less.",
        )
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=length,
        max_waiting=config.max_waiting,
        policy=config.scheduling_policy,
    )


def _describe(spec: EncoderSpec, pooling: PoolingSpec) -> PoolingInfo:
    if spec.head is not None:
        return PoolingInfo("classify", len(spec.head.labels), labels=spec.head.labels)
    return PoolingInfo(
        "embed",
        spec.hidden_size * len(pooling.modes),
        normalized=pooling.normalize,
        matryoshka=spec.matryoshka,
        sizes=spec.embedding_sizes,
        prompt=pooling.prompt,
        lowercase=pooling.lowercase,
    )
