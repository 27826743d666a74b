#include "elementwise.h"

#include <algorithm>
#include <cmath>

#include "page.h"
#include "simd.h"

namespace llmtool {
namespace {

constexpr int64_t MAX_HEAD = 1024;

// f(i, count) for i = 0, 16, ... below width; count < 16 for what is left at the end.
template <class F>
LLMTOOL_INLINE void for_lanes(int64_t width, F &&f) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) f(i, int64_t(LANES));
    if (i < width) f(i, width - i);
}

template <class T>
LLMTOOL_INLINE float inverse_rms(const T *x, int64_t width, float eps) {
    f32x16 squares = {};
    for_lanes(width, [&](int64_t i, int64_t count) {
        f32x16 v = load_lanes(x + i, count);
        squares += v * v;
    });
    return 1.0f / std::sqrt(reduce_add(squares) / float(width) + eps);
}

template <class X, class T>
void rms_norm(const RmsNorm &op, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const X *x = static_cast<const X *>(op.x) + row * op.x_stride;
        T *out = static_cast<T *>(op.out) + row * op.out_stride;
        float inverse = op.weight ? inverse_rms(x, op.width, float(op.eps)) : 1.0f;
        for_lanes(op.width, [&](int64_t i, int64_t count) {
            f32x16 y = load_lanes(x + i, count);
            if (op.weight) y = y * inverse * load_lanes(op.weight + i, count);
            if (op.add) y = float(op.scale) * y + load_lanes(out + i, count);
            store_lanes(out + i, y, count);
        });
    }
}

template <class T>
void write_kv(const WriteKv &op, const Batch &batch, int64_t first, int64_t last) {
    const PageLayout<T> layout{op.layer_offset, op.tokens_per_page, op.kv_heads, op.k_dim, op.v_dim};
    for (int64_t token = first; token < last; token++) {
        int64_t unit = batch.token_units[token], slot = batch.token_slots[token];
        std::copy_n(static_cast<const T *>(op.k) + token * op.k_stride, op.kv_heads * op.k_dim,
                    layout.keys(batch.arena, unit, slot, 0));
        if (op.v_dim)
            std::copy_n(static_cast<const T *>(op.v) + token * op.v_stride, op.kv_heads * op.v_dim,
                        layout.values(batch.arena, unit, slot, 0));
    }
}

// A head in float32, turned in place: dimensions i and i + pairs by the angle of pair i.
LLMTOOL_INLINE void rotate(float *head, const float *cos, const float *sin, int64_t pairs) {
    for_lanes(pairs, [&](int64_t i, int64_t count) {
        f32x16 a = load_lanes(head + i, count), b = load_lanes(head + i + pairs, count);
        f32x16 c = load_lanes(cos + i, count), s = load_lanes(sin + i, count);
        store_lanes(head + i, a * c - b * s, count);
        store_lanes(head + i + pairs, b * c + a * s, count);
    });
}

// Norm and rotate `heads` heads of one token; emit(head, values) takes each.
template <class X, class F>
LLMTOOL_INLINE void finish_heads(const QkvPost &op, const Rope &rope, int64_t token, const X *x, int64_t heads,
                                 const float *norm, F &&emit) {
    const int64_t dim = op.k_dim;
    float inverse = op.qk_norm == QK_NORM_ALL ? inverse_rms(x, heads * dim, float(op.eps)) : 1.0f;
    for (int64_t h = 0; h < heads; h++, x += dim) {
        alignas(64) float head[MAX_HEAD];
        if (op.qk_norm == QK_NORM_HEAD) inverse = inverse_rms(x, dim, float(op.eps));
        const float *weight = op.qk_norm == QK_NORM_ALL ? norm + h * dim : norm;
        for_lanes(dim, [&](int64_t i, int64_t count) {
            f32x16 v = load_lanes(x + i, count);
            if (op.qk_norm) v = v * inverse * load_lanes(weight + i, count);
            store_lanes(head + i, v, count);
        });
        rotate(head, rope.cos + token * rope.pairs, rope.sin + token * rope.pairs, rope.pairs);
        emit(h, head);
    }
}

template <class T>
LLMTOOL_INLINE void copy_head(T *out, const float *head, int64_t dim) {
    for_lanes(dim, [&](int64_t i, int64_t count) { store_lanes(out + i, load_lanes(head + i, count), count); });
}

// A token's key and value of one head into the tiles of its page.
template <class T>
LLMTOOL_INLINE void put_key(T *tile, int64_t lane, const float *key, int64_t dim) {
    constexpr int64_t KU = 4 / sizeof(T);
    alignas(64) T narrow[MAX_HEAD];
    copy_head(narrow, key, dim);
    for (int64_t i = 0; i < dim / KU; i++) std::memcpy(tile + (i * LANES + lane) * KU, narrow + i * KU, 4);
}

template <class X, class T>
LLMTOOL_INLINE void put_value(T *tile, int64_t place, const X *value, int64_t dim) {
    constexpr int64_t KU = 4 / sizeof(T);
    alignas(64) T narrow[LANES];
    for (int64_t i = 0; i < dim; i += LANES) {
        store_f32(narrow, load_f32(value + i));
        for (int64_t j = 0; j < LANES; j++) tile[(i + j) * KU + place] = narrow[j];
    }
}

template <class X, class T>
void qkv_post(const QkvPost &op, const Step &step, int64_t first, int64_t last) {
    constexpr int64_t KU = 4 / sizeof(T);
    const Batch &batch = step.batches[op.batch];
    const Rope rope = op.rope < 0 ? Rope{nullptr, nullptr, 0} : step.ropes[op.rope];
    const PageLayout<T> layout{op.layer_offset, op.tokens_per_page, op.kv_heads, op.k_dim, op.v_dim};
    const bool tiles = op.arrangement == TILES;
    for (int64_t token = first; token < last; token++) {
        const X *q = static_cast<const X *>(op.x) + token * op.x_stride;
        const X *k = q + op.heads * op.k_dim, *v = k + op.kv_heads * op.k_dim;
        T *q_out = static_cast<T *>(op.q_out) + token * op.q_stride;
        const int64_t unit = batch.token_units[token], slot = batch.token_slots[token];
        finish_heads(op, rope, token, q, op.heads, op.q_norm,
                     [&](int64_t h, const float *head) { copy_head(q_out + h * op.k_dim, head, op.k_dim); });
        finish_heads(op, rope, token, k, op.kv_heads, op.k_norm, [&](int64_t h, const float *head) {
            if (tiles)
                put_key(layout.key_tile(batch.arena, unit, slot, h), slot % LANES, head, op.k_dim);
            else
                copy_head(layout.keys(batch.arena, unit, slot, h), head, op.k_dim);
        });
        for (int64_t h = 0; h < op.kv_heads; h++, v += op.v_dim) {
            if (tiles) {
                put_value(layout.value_tile(batch.arena, unit, slot, h), slot % KU, v, op.v_dim);
                continue;
            }
            T *page = layout.values(batch.arena, unit, slot, h);
            for_lanes(op.v_dim, [&](int64_t i, int64_t count) {
                store_lanes(page + i, load_lanes(v + i, count), count);
            });
        }
    }
}

}  // namespace

void rms_norm_rows(const RmsNorm &op, int64_t first, int64_t last) {
    if (op.x_type == F32 && op.out_type == F32) return rms_norm<float, float>(op, first, last);
    if (op.x_type == F32) return rms_norm<float, uint16_t>(op, first, last);
    if (op.out_type == F32) return rms_norm<uint16_t, float>(op, first, last);
    rms_norm<uint16_t, uint16_t>(op, first, last);
}

void write_kv_rows(const WriteKv &op, const Step &step, int64_t first, int64_t last) {
    const Batch &batch = step.batches[op.batch];
    op.type == F32 ? write_kv<float>(op, batch, first, last) : write_kv<uint16_t>(op, batch, first, last);
}

void qkv_post_rows(const QkvPost &op, const Step &step, int64_t first, int64_t last) {
    if (op.type == F32)
        qkv_post<float, float>(op, step, first, last);
    else if (op.x_type == F32)
        qkv_post<float, uint16_t>(op, step, first, last);
    else
        qkv_post<uint16_t, uint16_t>(op, step, first, last);
}

}  // namespace llmtool
