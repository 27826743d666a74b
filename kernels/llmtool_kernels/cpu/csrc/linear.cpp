#include "linear.h"

#include <algorithm>

#include "expand.h"
#include "gate.h"

namespace llmtool {
namespace {

constexpr int64_t TASK_ROWS = 16 * MAX_TILE_ROWS;  // their part of x stays in the second-level cache
constexpr int64_t MAX_GROUP = 256;
constexpr int64_t FETCH_AHEAD = 4096;  // bytes; products of one group take too long for the hardware to see a stream

int64_t panels(const Weight &w) { return (w.n + PANEL - 1) / PANEL; }

const uint8_t *panel_data(const Weight &w, int64_t panel) {
    return static_cast<const uint8_t *>(w.data) + panel * packed_bytes(w.format, w.k);
}

const uint16_t *panel_scales(const Weight &w, int64_t panel) {
    return w.scales + panel * (w.k / w.group) * PANEL;
}

// A sum of k products for each of 32 columns, on its way out.
struct Writer {
    const Linear &op;
    int64_t panel;

    template <class T>
    void put_columns(int64_t row, int64_t column, f32x16 v, int64_t width) const {
        T *out = static_cast<T *>(op.out) + row * op.out_stride + column;
        int64_t count = std::min<int64_t>(LANES, width - column);
        if (count <= 0) return;
        if (op.epilogue == ADD) v = float(op.scale) * v + load_lanes(out, count);
        store_lanes(out, v, count);
    }

    void put_columns(int64_t row, int64_t column, f32x16 v, int64_t width) const {
        if (op.out_type == F32)
            put_columns<float>(row, column, v, width);
        else
            put_columns<uint16_t>(row, column, v, width);
    }

    void operator()(int64_t row, f32x16 left, f32x16 right) const {
        if (op.bias) {
            left += load<f32x16>(op.bias + panel * PANEL);
            right += load<f32x16>(op.bias + panel * PANEL + LANES);
        }
        if (op.epilogue == GATED) {  // 16 columns of gate, then the same of up
            put_columns(row, panel * LANES, join(op.gate, left, right), op.weight.n / 2);
        } else {
            put_columns(row, panel * PANEL, left, op.weight.n);
            put_columns(row, panel * PANEL + LANES, right, op.weight.n);
        }
    }
};

// Rows [first, last) in blocks of at most MAX_TILE_ROWS, as equal as can be.
template <class F>
void for_blocks(int64_t first, int64_t last, F &&f) {
    int64_t blocks = (last - first + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t from = first + (last - first) * b / blocks, to = first + (last - first) * (b + 1) / blocks;
        with_rows(to - from, [&](auto rows) { f(rows, from, b + 1 == blocks); });
    }
}

template <class E>
void dense_task(const Linear &op, int64_t first, int64_t last, int64_t panel, int64_t next_panel) {
    using T = typename E::T;
    const T *x = static_cast<const T *>(op.x);
    const T *w = reinterpret_cast<const T *>(panel_data(op.weight, panel));
    const T *next = next_panel < 0 ? nullptr : reinterpret_cast<const T *>(panel_data(op.weight, next_panel));
    Writer write{op, panel};
    for_blocks(first, last, [&](auto rows, int64_t row, bool is_last) {
        constexpr int ROWS = decltype(rows)::value;
        Accumulators<ROWS> acc = {};
        const T *a = x + row * op.x_stride;
        // With few rows memory is the limit, and the hardware's own prefetching reaches it.
        if (ROWS >= 3 && is_last && next != nullptr)
            tile<E, ROWS>(a, op.x_stride, w, op.weight.k / E::KU, acc, [&](int64_t unit) {
                prefetch(next + unit * PANEL * E::KU);
                prefetch(next + unit * PANEL * E::KU + LANES * E::KU);
            });
        else
            tile<E, ROWS>(a, op.x_stride, w, op.weight.k / E::KU, acc, NoFetch());
        for (int m = 0; m < ROWS; m++) write(row + m, acc[m][0], acc[m][1]);
    });
}

template <class E>
void quantized_task(const Linear &op, int64_t first, int64_t last, int64_t panel) {
    using T = typename E::T;
    const Weight &w = op.weight;
    const T *x = static_cast<const T *>(op.x);
    const uint8_t *q = panel_data(w, panel);
    const uint16_t *scales = panel_scales(w, panel);
    alignas(64) T group[MAX_GROUP * PANEL];
    alignas(64) f32x16 sums[TASK_ROWS][2];
    for (int64_t m = 0; m < last - first; m++) sums[m][0] = sums[m][1] = f32x16{};
    for (int64_t k = 0; k < w.k; k += w.group, scales += PANEL) {
        const uint8_t *packed = q + packed_bytes(w.format, k);
        for (int64_t i = 0; i < packed_bytes(w.format, w.group); i += 64) prefetch(packed + FETCH_AHEAD + i);
        expand(w.format, packed, w.group, group);
        f32x16 scale0 = load_f32(scales), scale1 = load_f32(scales + LANES);
        for_blocks(first, last, [&](auto rows, int64_t row, bool) {
            constexpr int ROWS = decltype(rows)::value;
            Accumulators<ROWS> acc = {};
            tile<E, ROWS>(x + row * op.x_stride + k, op.x_stride, group, w.group / E::KU, acc, NoFetch());
            for (int m = 0; m < ROWS; m++) {
                sums[row - first + m][0] += scale0 * acc[m][0];
                sums[row - first + m][1] += scale1 * acc[m][1];
            }
        });
    }
    Writer write{op, panel};
    for (int64_t m = 0; m < last - first; m++) write(first + m, sums[m][0], sums[m][1]);
}

// Row `row` of a weight, times scale. Its values lie apart, one or two in every line of its panel.
void unpack_row(const Weight &w, int64_t row, float scale, float *out) {
    const uint8_t *data = panel_data(w, row / PANEL);
    const int64_t column = row % PANEL;
    if (w.format == PANEL_F32) {
        const float *values = reinterpret_cast<const float *>(data) + column;
        for (int64_t k = 0; k < w.k; k++) out[k] = scale * values[k * PANEL];
    } else if (w.format == PANEL_BF16) {
        const uint16_t *pairs = reinterpret_cast<const uint16_t *>(data) + 2 * column;
        for (int64_t k = 0; k < w.k; k++) out[k] = scale * bf16_to_f32(pairs[k / 2 * PAIRS + k % 2]);
    } else {
        const uint16_t *scales = panel_scales(w, row / PANEL) + column;
        for (int64_t k = 0; k < w.k; k++) {
            int64_t unit = k / 2, place = 2 * column + k % 2;
            float q;
            if (w.format == PANEL_INT8)
                q = float(reinterpret_cast<const int8_t *>(data)[unit * PAIRS + place]);
            else
                q = float((load<uint16_t>(data + unit / 4 * 2 * PAIRS + 2 * place) >> (4 * (unit % 4)) & 15) - 8);
            out[k] = scale * (bf16_to_f32(scales[k / w.group * PANEL]) * q);
        }
    }
}

template <class E>
void pack_floats(const typename E::T *src, int64_t n, int64_t k, bool gated, typename E::T *out, int64_t panel) {
    out += panel * PANEL * k;
    for (int64_t c = 0; c < PANEL; c++) {
        int64_t row = panel * PANEL + c, limit = n;
        if (gated) {  // gate and up of the same 16 outputs side by side
            row = panel * LANES + c % LANES + (c < LANES ? 0 : n / 2);
            limit = c < LANES ? n / 2 : n;
        }
        for (int64_t u = 0; u < k / E::KU; u++)
            for (int i = 0; i < E::KU; i++)
                out[(u * PANEL + c) * E::KU + i] = row < limit ? src[row * k + u * E::KU + i] : 0;
    }
}

}  // namespace

bool linear_valid(const Linear &op) {
    const Weight &w = op.weight;
    if (op.epilogue == ADD && op.out_type != F32) return false;
    if (w.format == PANEL_F32) return op.x_type == F32;
    if (w.format == PANEL_BF16) return op.x_type == BF16 && w.k % 2 == 0;
    return w.group % 8 == 0 && w.k % w.group == 0 && w.group <= MAX_GROUP;
}

int64_t linear_tasks(const Linear &op, int64_t rows) {
    return panels(op.weight) * ((rows + TASK_ROWS - 1) / TASK_ROWS);
}

void linear_task(const Linear &op, int64_t rows, int64_t task, int64_t next) {
    int64_t count = panels(op.weight), panel = task % count;
    int64_t first = task / count * TASK_ROWS, last = std::min(first + TASK_ROWS, rows);
    bool quantized = op.weight.format == PANEL_INT8 || op.weight.format == PANEL_INT4;
    if (quantized && op.x_type == BF16) return quantized_task<Bfloat16>(op, first, last, panel);
    if (quantized) return quantized_task<Float32>(op, first, last, panel);
    int64_t next_panel = next < 0 ? -1 : next % count;
    if (op.x_type == BF16) return dense_task<Bfloat16>(op, first, last, panel, next_panel);
    dense_task<Float32>(op, first, last, panel, next_panel);
}

void embed_rows(const Embed &op, const int64_t *ids, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++)
        unpack_row(op.table, ids[i], float(op.scale), op.out + i * op.out_stride);
}

void pack_panel(int64_t format, const void *src, int64_t n, int64_t k, bool gated, void *out, int64_t panel) {
    if (format == PANEL_F32)
        pack_floats<Float32>(static_cast<const float *>(src), n, k, gated, static_cast<float *>(out), panel);
    else
        pack_floats<Bfloat16>(static_cast<const uint16_t *>(src), n, k, gated, static_cast<uint16_t *>(out), panel);
}

}  // namespace llmtool
