// The C interface: a step is an array of operations, run in order by one team of threads.
//
// abi.py mirrors these structures field by field. Every field is 8 bytes wide, so that both sides agree on the
// layout. Pointers are borrowed for the duration of a call. Activations are [rows, width], row-major with a
// stride in elements; they are float32, or of the model's own element type ("E": float32 or bfloat16).
#pragma once
#include <cstdint>

namespace llmtool {

enum Element : int64_t { F32 = 0, BF16 = 1 };

enum Format : int64_t { PANEL_F32 = 0, PANEL_BF16 = 1, PANEL_INT8 = 2, PANEL_INT4 = 3, PANEL_COMPACT = 4 };

// A value that a compact panel does not hold (compact.h). column: 0..31, of the panel. value: bfloat16.
struct Exception {
    int32_t k;
    uint16_t column, value;
};

// A matrix [n, k] in panels of 32 rows, zero-padded (panel.h). scales: bfloat16, per panel, group of k and row.
// Of a compact matrix, panel i's exceptions are [starts[i], starts[i + 1]).
struct Weight {
    int64_t format, n, k;
    int64_t group;  // columns that share a scale; k for formats without scales
    const void *data;
    const uint16_t *scales;
    const int64_t *starts;
    const Exception *exceptions;
};

constexpr int64_t ROWS_ALL = -1;  // an operation's number of rows: as many as the step has tokens

// out[i] = scale * table[ids[i]]; float32.
struct Embed {
    Weight table;
    double scale;
    float *out;
    int64_t out_stride;
};

// y = x / rms(x) * weight, or x without a weight; then out = y, or out (float32) += scale * y.
struct RmsNorm {
    const void *x;
    const float *weight;
    void *out;
    int64_t x_stride, x_type, out_stride, out_type, width, add;
    double eps, scale;
};

// How gate and up are joined: act(gate) * up; CLAMPED, with gate at most limit and up within +-limit, gives
// gate * sigmoid(alpha * gate) * (up + 1).
enum GateKind : int64_t { SILU = 0, GELU_TANH = 1, GELU = 2, CLAMPED = 3 };

struct Gate {
    int64_t kind;
    double alpha, limit;
};

enum Epilogue : int64_t { STORE = 0, ADD = 1, GATED = 2 };

// y = x w^T + bias; then out = y, out (float32) += scale * y, or for a gated weight out = gate joined with up.
struct Linear {
    Weight weight;
    const void *x;
    const float *bias;  // in the order of the weight's packed rows, zero-padded with them; or null
    void *out;
    int64_t x_stride, x_type, out_stride, out_type, epilogue;
    double scale;
    Gate gate;
};

// k [rows, Hkv, Dk] and v [rows, Hkv, Dv] to their pages; v_dim 0: no v.
struct WriteKv {
    const void *k, *v;
    int64_t k_stride, v_stride, type, kv_heads, k_dim, v_dim, tokens_per_page, layer_offset, batch;
};

enum QkNorm : int64_t { QK_NORM_NONE = 0, QK_NORM_HEAD = 1, QK_NORM_ALL = 2 };

// From x [rows, (Hq + Hkv) * Dk + Hkv * Dv]: norm and rotate q and k, write k and v to their pages, q to q_out.
// rope: number of the step's rotary table; negative for none.
struct QkvPost {
    const void *x;
    void *q_out;
    const float *q_norm, *k_norm;
    int64_t x_stride, x_type, q_stride, type;
    int64_t heads, kv_heads, k_dim, v_dim, tokens_per_page, layer_offset, batch, rope;
    int64_t qk_norm, arrangement;  // page.h
    double eps;
};

// Causal attention over pages. window: tokens seen, itself included; 0 for all. softcap: 0 for none. latent: pages
// hold no V, whose rows are the leading v_dim dimensions of K's.
struct Attention {
    const void *q;
    void *out;
    const float *sinks;  // one extra logit per query head, or null
    int64_t q_stride, out_stride, type;
    int64_t heads, kv_heads, k_dim, v_dim, tokens_per_page, layer_offset, batch, window, latent;
    int64_t arrangement;  // page.h; a latent layer's is ROWS
    double scale, softcap;
};

enum Kind : int64_t { EMBED, RMS_NORM, LINEAR, WRITE_KV, QKV_POST, ATTENTION };

struct Op {
    int64_t kind, rows;
    union {
        Embed embed;
        RmsNorm rms_norm;
        Linear linear;
        WriteKv write_kv;
        QkvPost qkv_post;
        Attention attention;
    };
};

// One KV group's view of a step: AttentionBatch of attention.py.
struct Batch {
    int64_t num_seqs, table_width;
    const int32_t *query_start, *seq_lens, *block_tables;
    const int64_t *token_units, *token_slots;
    const int64_t *tree;  // [tokens] which of its sequence's new tokens each sees, a bit each; or null: those before it
    uint8_t *arena;
};

// Rotary tables of one kind: float32 [num_tokens, pairs]; pair i turns dimensions i and i + pairs of a head.
struct Rope {
    const float *cos, *sin;
    int64_t pairs;
};

struct Step {
    int64_t num_tokens;
    const int64_t *input_ids;
    const Batch *batches;
    const Rope *ropes;
};

}  // namespace llmtool

#define LLMTOOL_EXPORT extern "C" __attribute__((visibility("default")))

// Run the operations on up to `threads` threads. Returns 0, or the index + 1 of an operation it cannot run.
LLMTOOL_EXPORT int64_t llmtool_run(const llmtool::Op *ops, int64_t num_ops, const llmtool::Step *step,
                                   int64_t threads);

// Pack src, row-major [n, k] of F32 or BF16, into panels. gated: rows are gate, then up, and are interleaved. Compact
// panels (of BF16; k a multiple of 4) have their exceptions counted in counts [panels], and the first `room` of each
// written to exceptions [panels][room].
LLMTOOL_EXPORT void llmtool_pack(int64_t format, const void *src, int64_t n, int64_t k, int64_t gated, void *out,
                                 int64_t *counts, llmtool::Exception *exceptions, int64_t room, int64_t threads);

// "amx", "avx512_bf16" or "portable": which instructions the bfloat16 kernels use here.
LLMTOOL_EXPORT const char *llmtool_isa();
