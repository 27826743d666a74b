"""The structures of csrc/api.h, field by field, for ctypes. Every field is 8 bytes wide."""

from __future__ import annotations

import ctypes
from ctypes import Structure, Union, c_double, c_int64, c_void_p

F32, BF16 = 0, 1  # Element
PANEL_F32, PANEL_BF16, PANEL_INT8, PANEL_INT4, PANEL_COMPACT = range(5)  # Format
ROWS_ALL = -1
STORE, ADD, GATED = range(3)  # Epilogue
SILU, GELU_TANH, GELU, CLAMPED = range(4)  # GateKind
ROWS, TILES = range(2)  # Arrangement
QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_ALL = range(3)  # QkNorm
EMBED, RMS_NORM, LINEAR, WRITE_KV, QKV_POST, ATTENTION = range(6)  # Kind


def _fields(spec: str) -> list[tuple[str, type]]:
    """Fields in order: `*name` is a pointer, `name.` a double, `name` an integer."""
    fields: list[tuple[str, type]] = []
    for word in spec.split():
        kind: type = c_void_p if word.startswith("*") else c_double if word.endswith(".") else c_int64
        fields.append((word.strip("*."), kind))
    return fields


class Weight(Structure):
    _fields_ = _fields("format n k group *data *scales *starts *exceptions")


class Embed(Structure):
    _fields_ = [("table", Weight), *_fields("scale. *out out_stride")]


class RmsNorm(Structure):
    _fields_ = _fields("*x *weight *out x_stride x_type out_stride out_type width add eps. scale.")


class Gate(Structure):
    _fields_ = _fields("kind alpha. limit.")


class Linear(Structure):
    _fields_ = [
        ("weight", Weight),
        *_fields("*x *bias *out x_stride x_type out_stride out_type epilogue scale."),
        ("gate", Gate),
    ]


class WriteKv(Structure):
    _fields_ = _fields("*k *v k_stride v_stride type kv_heads k_dim v_dim tokens_per_page layer_offset batch")


class QkvPost(Structure):
    _fields_ = _fields(
        "*x *q_out *q_norm *k_norm x_stride x_type q_stride type "
        "heads kv_heads k_dim v_dim tokens_per_page layer_offset batch rope qk_norm arrangement eps."
    )


class Attention(Structure):
    _fields_ = _fields(
        "*q *out *sinks q_stride out_stride type "
        "heads kv_heads k_dim v_dim tokens_per_page layer_offset batch window latent arrangement scale. softcap."
    )


class Body(Union):
    _fields_ = [
        ("embed", Embed),
        ("rms_norm", RmsNorm),
        ("linear", Linear),
        ("write_kv", WriteKv),
        ("qkv_post", QkvPost),
        ("attention", Attention),
    ]


class Op(Structure):
    _anonymous_ = ("body",)
    _fields_ = [("kind", c_int64), ("rows", c_int64), ("body", Body)]


class Batch(Structure):
    _fields_ = _fields(
        "num_seqs table_width *query_start *seq_lens *block_tables *token_units *token_slots *tree *arena"
    )


class Rope(Structure):
    _fields_ = _fields("*cos *sin pairs")


class Step(Structure):
    _fields_ = _fields("num_tokens *input_ids *batches *ropes")


def declare(library: ctypes.CDLL) -> None:
    """Give the library's functions their types."""
    library.llmtool_run.argtypes = (c_void_p, c_int64, c_void_p, c_int64)
    library.llmtool_run.restype = c_int64
    library.llmtool_pack.argtypes = (
        (c_int64, c_void_p, c_int64, c_int64, c_int64) + 3 * (c_void_p,) + 2 * (c_int64,)
    )
    library.llmtool_pack.restype = None
    library.llmtool_isa.argtypes = ()
    library.llmtool_isa.restype = ctypes.c_char_p
