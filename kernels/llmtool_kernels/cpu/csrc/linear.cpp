#include "linear.h"

#include <algorithm>
#include <vector>

#include "amx.h"
#include "compact.h"
#include "expand.h"
#include "gate.h"
#include "integer.h"

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

// Rows [first, last) in blocks of at most MOST, as equal as can be.
template <int MOST = MAX_TILE_ROWS, class F>
void for_blocks(int64_t first, int64_t last, F &&f) {
    int64_t blocks = (last - first + MOST - 1) / MOST;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t from = first + (last - first) * b / blocks, to = first + (last - first) * (b + 1) / blocks;
        with_rows(to - from, [&](auto rows) { f(rows, from, b + 1 == blocks); });
    }
}

// Adds what a compact panel leaves out.
class CompactWriter {
  public:
    CompactWriter(const Linear &op, int64_t panel)
        : write_{op, panel}, op_(op), first_(op.weight.starts[panel]), last_(op.weight.starts[panel + 1]) {}

    void operator()(int64_t row, f32x16 left, f32x16 right) const {
        if (first_ != last_) {
            const uint16_t *x = static_cast<const uint16_t *>(op_.x) + row * op_.x_stride;
            // In registers: sums gathered in memory would be read back before their stores are done.
            for (int64_t i = first_; i < last_; i++) {
                const Exception &e = op_.weight.exceptions[i];
                const float product = bf16_to_f32(x[e.k]) * bf16_to_f32(e.value);
                left += at_lane(e.column, product), right += at_lane(e.column - LANES, product);
            }
        }
        write_(row, left, right);
    }

  private:
    Writer write_;
    const Linear &op_;
    int64_t first_, last_;
};

// A thread's room for one panel of bfloat16.
uint16_t *room_for_panel(const Weight &w) {
    struct alignas(64) Line {
        uint16_t values[PANEL];
    };
    static thread_local std::vector<Line> lines;
    if (int64_t(lines.size()) < w.k) lines.resize(w.k);
    return lines[0].values;
}

#if LLMTOOL_AMX

// A compact panel's values, without its exceptions, until the thread asks for another's.
const uint16_t *decoded_panel(const Weight &w, int64_t panel) {
    uint16_t *values = room_for_panel(w);
    CompactReader reader(panel_data(w, panel));
    for (int64_t u = 0; u < w.k / 2; u += 2) reader.copy_two(values + u * COMPACT_UNIT);
    return values;
}

bool tiles_serve(const Linear &op, int64_t rows) {
    return op.weight.k % TILE_K == 0 && rows >= TILE_ROWS && tiles_allowed();
}

// The rows of a task that fill tiles; returns the first that does not. 16 rows always go through tiles and fewer
// never, so that which of them a row goes through depends on the number of rows, and its sum in the last bits.
template <class W>
int64_t tile_rows(const Linear &op, int64_t first, int64_t last, const uint16_t *w, const W &write) {
    const uint16_t *x = static_cast<const uint16_t *>(op.x);
    alignas(64) float out[2 * TILE_ROWS][PANEL];
    tiles_begin();
    while (last - first >= TILE_ROWS) {
        const uint16_t *a = x + first * op.x_stride;
        int64_t rows = last - first >= 2 * TILE_ROWS ? 2 * TILE_ROWS : TILE_ROWS;
        if (rows == 2 * TILE_ROWS)
            tile_product<2 * TILE_ROWS>(a, op.x_stride, w, op.weight.k, out);
        else
            tile_product<TILE_ROWS>(a, op.x_stride, w, op.weight.k, out);
        for (int64_t m = 0; m < rows; m++)
            write(first + m, load<f32x16>(out[m]), load<f32x16>(out[m] + LANES));
        first += rows;
    }
    tiles_end();
    return first;
}

#endif

template <class E>
void dense_task(const Linear &op, int64_t first, int64_t last, int64_t panel, int64_t next_panel) {
    using T = typename E::T;
    const T *x = static_cast<const T *>(op.x);
    const T *w = reinterpret_cast<const T *>(panel_data(op.weight, panel));
    const T *next = next_panel < 0 ? nullptr : reinterpret_cast<const T *>(panel_data(op.weight, next_panel));
    Writer write{op, panel};
    for_blocks(first, last, [&](auto rows, int64_t row, bool is_last) {
        constexpr int ROWS = decltype(rows)::value;
        Accumulators<E, ROWS> acc = {};
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

// A few rows: values go from memory into products, never to memory again.
template <int ROWS>
void compact_rows(const Linear &op, int64_t first, int64_t panel, int64_t next_panel) {
    const uint8_t *next = next_panel < 0 ? nullptr : panel_data(op.weight, next_panel);
    const uint16_t *x = static_cast<const uint16_t *>(op.x) + first * op.x_stride;
    Accumulators<Bfloat16, ROWS> acc = {};
    if (ROWS >= 3 && next != nullptr)
        compact_tile<ROWS>(x, op.x_stride, panel_data(op.weight, panel), op.weight.k / 2, acc, FetchCompact{next});
    else
        compact_tile<ROWS>(x, op.x_stride, panel_data(op.weight, panel), op.weight.k / 2, acc, NoFetch());
    CompactWriter write(op, panel);
    for (int m = 0; m < ROWS; m++) write(first + m, acc[m][0], acc[m][1]);
}

// Sums of `rows` rows on their way out: one call for all.
__attribute__((noinline)) void finish_rows(const Linear &op, int64_t row, int64_t rows, int64_t panel,
                                           const f32x16 (*acc)[2]) {
    CompactWriter write(op, panel);
    for (int64_t m = 0; m < rows; m++) write(row + m, acc[m][0], acc[m][1]);
}

// ROWS rows that decode the panel on its way. kept: room for the whole panel decoded, or null. next: the panel to fetch
// meanwhile, or null. Functions of their own: one with all of them inside is too big for GCC to keep sums in registers.
template <int ROWS>
__attribute__((noinline)) void compact_block(const Linear &op, int64_t row, int64_t panel, const uint8_t *next,
                                             uint16_t *kept) {
    const uint16_t *x = static_cast<const uint16_t *>(op.x) + row * op.x_stride;
    const uint8_t *w = panel_data(op.weight, panel);
    const int64_t units = op.weight.k / 2;
    alignas(64) uint16_t chunk[CHUNK * COMPACT_UNIT];
    Accumulators<Bfloat16, ROWS> acc = {};
    if (kept != nullptr)
        compact_tile_through<ROWS>(x, op.x_stride, w, units, kept, units, acc, NoFetch());
    else if (next == nullptr)
        compact_tile_through<ROWS>(x, op.x_stride, w, units, chunk, CHUNK, acc, NoFetch());
    else
        compact_tile_through<ROWS>(x, op.x_stride, w, units, chunk, CHUNK, acc, FetchCompact{next});
    finish_rows(op, row, ROWS, panel, acc);
}

// ROWS rows that find it decoded. next: null where it is not these rows' to fetch.
template <int ROWS>
__attribute__((noinline)) void decoded_block(const Linear &op, int64_t row, int64_t panel, const uint8_t *next,
                                             const uint16_t *w) {
    const uint16_t *x = static_cast<const uint16_t *>(op.x) + row * op.x_stride;
    Accumulators<Bfloat16, ROWS> acc = {};
    if (next != nullptr)
        tile<Bfloat16, ROWS>(x, op.x_stride, w, op.weight.k / 2, acc, FetchCompact{next});
    else
        tile<Bfloat16, ROWS>(x, op.x_stride, w, op.weight.k / 2, acc, NoFetch());
    finish_rows(op, row, ROWS, panel, acc);
}

// More rows: the first block of them decodes the panel, into the second-level cache for the others.
void compact_task(const Linear &op, int64_t first, int64_t last, int64_t panel, int64_t next_panel) {
    const int64_t rows = last - first;
    if (rows == 1) return compact_rows<1>(op, first, panel, next_panel);
    if (rows == 2) return compact_rows<2>(op, first, panel, next_panel);
    if (rows == 3) return compact_rows<3>(op, first, panel, next_panel);
    const uint8_t *next = panel_data(op.weight, next_panel < 0 ? panel : next_panel);
    auto decode = [&](int64_t row, int64_t count, const uint8_t *fetched, uint16_t *kept) {
        with_rows<THROUGH_ROWS>(count, [&](auto constant) {
            compact_block<decltype(constant)::value>(op, row, panel, fetched, kept);
        });
    };
    if (rows <= THROUGH_ROWS) return decode(first, rows, next, nullptr);
    if (rows <= MAX_TILE_ROWS) {  // decoding twice is less than bringing what is decoded back
        const int64_t half = (rows + 1) / 2;
        decode(first, half, nullptr, nullptr);
        return decode(first + half, rows - half, next, nullptr);
    }
    uint16_t *decoded = room_for_panel(op.weight);
    const int64_t block = std::min<int64_t>(THROUGH_ROWS, rows - MAX_TILE_ROWS);
    decode(first, block, nullptr, decoded);
    for_blocks(first + block, last, [&](auto constant, int64_t row, bool is_last) {
        decoded_block<decltype(constant)::value>(op, row, panel, is_last ? next : nullptr, decoded);
    });
}

// Integer weights, expanded to panels of E a group at a time. x: the task's rows, as E. finish(row, group, sum, scale):
// what a group's sum of products adds to a row of the task.
template <class E, class F>
void grouped_task(const Linear &op, int64_t first, int64_t last, int64_t panel, const typename E::T *x, int64_t lda,
                  F &&finish) {
    const Weight &w = op.weight;
    const uint8_t *packed = panel_data(w, panel);
    const uint16_t *scales = panel_scales(w, panel);
    alignas(64) typename E::T group[MAX_GROUP * PANEL];
    alignas(64) f32x16 sums[TASK_ROWS][2];
    for (int64_t m = 0; m < last - first; m++) sums[m][0] = sums[m][1] = f32x16{};
    for (int64_t g = 0; g < w.k / w.group; g++, scales += PANEL, packed += packed_bytes(w.format, w.group)) {
        for (int64_t i = 0; i < packed_bytes(w.format, w.group); i += 64) prefetch(packed + FETCH_AHEAD + i);
        expand(w.format, packed, w.group, group);
        f32x16 scale0 = load_f32(scales), scale1 = load_f32(scales + LANES);
        for_blocks<E::MOST_ROWS>(0, last - first, [&](auto rows, int64_t row, bool) {
            constexpr int ROWS = std::min(decltype(rows)::value, E::MOST_ROWS);
            Accumulators<E, ROWS> acc = {};
            tile<E, ROWS>(x + row * lda + g * w.group, lda, group, w.group / E::KU, acc, NoFetch());
            for (int m = 0; m < ROWS; m++) {
                sums[row + m][0] += finish(row + m, g, acc[m][0], scale0);
                sums[row + m][1] += finish(row + m, g, acc[m][1], scale1);
            }
        });
    }
    Writer write{op, panel};
    for (int64_t m = 0; m < last - first; m++) write(first + m, sums[m][0], sums[m][1]);
}

template <class E>
void quantized_task(const Linear &op, int64_t first, int64_t last, int64_t panel) {
    const typename E::T *x = static_cast<const typename E::T *>(op.x) + first * op.x_stride;
    grouped_task<E>(op, first, last, panel, x, op.x_stride,
                    [](int64_t, int64_t, f32x16 sum, f32x16 scale) { return scale * sum; });
}

#if LLMTOOL_AVX512_VNNI

// The rows of a task as integers. A thread rounds them for the first of an operation's tasks that it runs.
class RoundedRows {
  public:
    // serial: of the operation's run.
    void fill(const Linear &op, int64_t first, int64_t last, uint64_t serial) {
        if (serial == serial_ && first == first_ && last == last_) return;
        serial_ = serial, first_ = first, last_ = last;
        const int64_t k = op.weight.k, group = op.weight.group, groups = k / group;
        q_.resize((last - first) * k);
        scales_.resize((last - first) * groups);
        for (int64_t row = first; row < last; row++) {
            const uint16_t *x = static_cast<const uint16_t *>(op.x) + row * op.x_stride;
            for (int64_t g = 0; g < groups; g++)
                scales_[(row - first) * groups + g] =
                    round_group(x + g * group, group, q_.data() + (row - first) * k + g * group);
        }
    }
    const int16_t *q() const { return q_.data(); }
    const float *scales() const { return scales_.data(); }

  private:
    uint64_t serial_ = 0;
    int64_t first_ = 0, last_ = 0;
    std::vector<int16_t> q_;
    std::vector<float> scales_;
};

// A few rows: integers go from memory into products, never to memory again.
template <int ROWS>
void integer_rows(const Linear &op, const RoundedRows &x, int64_t first, int64_t panel) {
    const Weight &w = op.weight;
    const int64_t groups = w.k / w.group;
    const uint8_t *packed = panel_data(w, panel);
    const uint16_t *scales = panel_scales(w, panel);
    f32x16 sums[ROWS][2] = {};
    for (int64_t g = 0; g < groups; g++, packed += packed_bytes(w.format, w.group)) {
        IntegerSums<ROWS> acc = {};
        if (w.format == PANEL_INT8)
            int8_tile<ROWS>(x.q() + g * w.group, w.k, packed, w.group, acc);
        else
            int4_tile<ROWS>(x.q() + g * w.group, w.k, packed, w.group, acc);
        for (int half = 0; half < 2; half++) {
            f32x16 scale = load_f32(scales + g * PANEL + half * LANES);
            for (int m = 0; m < ROWS; m++)
                sums[m][half] += __builtin_convertvector(acc[m][half], f32x16) * (scale * x.scales()[m * groups + g]);
        }
    }
    Writer write{op, panel};
    for (int m = 0; m < ROWS; m++) write(first + m, sums[m][0], sums[m][1]);
}

void integer_task(const Linear &op, int64_t first, int64_t last, int64_t panel, uint64_t serial) {
    static thread_local RoundedRows x;
    x.fill(op, first, last, serial);
    switch (last - first) {
        case 1: return integer_rows<1>(op, x, first, panel);
        case 2: return integer_rows<2>(op, x, first, panel);
        case 3: return integer_rows<3>(op, x, first, panel);
        case 4: return integer_rows<4>(op, x, first, panel);
        case 5: return integer_rows<5>(op, x, first, panel);
        case 6: return integer_rows<6>(op, x, first, panel);
        default: break;
    }
    const int64_t groups = op.weight.k / op.weight.group;
    grouped_task<Int16>(op, first, last, panel, x.q(), op.weight.k,
                        [&](int64_t row, int64_t group, i32x16 sum, f32x16 scale) {
                            return __builtin_convertvector(sum, f32x16) * (scale * x.scales()[row * groups + group]);
                        });
}

#endif

// Row `row` of a weight, times scale. Its values lie apart, one or two in every line of its panel.
void unpack_row(const Weight &w, int64_t row, float scale, float *out) {
    const uint8_t *data = panel_data(w, row / PANEL);
    const int64_t column = row % PANEL;
    if (w.format == PANEL_F32) {
        const float *values = reinterpret_cast<const float *>(data) + column;
        for (int64_t k = 0; k < w.k; k++) out[k] = scale * values[k * PANEL];
    } else if (w.format == PANEL_COMPACT) {
        for (int64_t k = 0; k < w.k; k++)
            out[k] = scale * bf16_to_f32(compact_at(data, k / 2, int(2 * column + k % 2)));
        for (int64_t i = w.starts[row / PANEL]; i < w.starts[row / PANEL + 1]; i++)
            if (w.exceptions[i].column == column)
                out[w.exceptions[i].k] = scale * bf16_to_f32(w.exceptions[i].value);
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

// Panel number `panel` of a matrix, to out.
template <class E>
void pack_floats(const typename E::T *src, int64_t n, int64_t k, bool gated, typename E::T *out, int64_t panel) {
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
    if (w.format == PANEL_COMPACT) return op.x_type == BF16 && w.k % 4 == 0;
    if (w.format == PANEL_BF16) return op.x_type == BF16 && w.k % 2 == 0;
    return w.group % 8 == 0 && w.k % w.group == 0 && w.group <= MAX_GROUP;
}

int64_t linear_tasks(const Linear &op, int64_t rows) {
    return panels(op.weight) * ((rows + TASK_ROWS - 1) / TASK_ROWS);
}

void linear_task(const Linear &op, int64_t rows, int64_t task, int64_t next, uint64_t serial) {
    int64_t count = panels(op.weight), panel = task % count;
    int64_t first = task / count * TASK_ROWS, last = std::min(first + TASK_ROWS, rows);
    bool quantized = op.weight.format == PANEL_INT8 || op.weight.format == PANEL_INT4;
#if LLMTOOL_AVX512_VNNI
    if (quantized && op.x_type == BF16) return integer_task(op, first, last, panel, serial);
#else
    (void)serial;
    if (quantized && op.x_type == BF16) return quantized_task<Bfloat16>(op, first, last, panel);
#endif
    if (quantized) return quantized_task<Float32>(op, first, last, panel);
    int64_t next_panel = next < 0 ? -1 : next % count;
    if (op.weight.format == PANEL_COMPACT) {
#if LLMTOOL_AMX
        if (tiles_serve(op, last - first))
            first = tile_rows(op, first, last, decoded_panel(op.weight, panel), CompactWriter(op, panel));
        if (first == last) return;
#endif
        return compact_task(op, first, last, panel, next_panel);
    }
    if (op.x_type == BF16) {
#if LLMTOOL_AMX
        if (tiles_serve(op, last - first)) {
            const uint16_t *w = reinterpret_cast<const uint16_t *>(panel_data(op.weight, panel));
            first = tile_rows(op, first, last, w, Writer{op, panel});
        }
        if (first == last) return;
#endif
        return dense_task<Bfloat16>(op, first, last, panel, next_panel);
    }
    dense_task<Float32>(op, first, last, panel, next_panel);
}

void embed_rows(const Embed &op, const int64_t *ids, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++)
        unpack_row(op.table, ids[i], float(op.scale), op.out + i * op.out_stride);
}

int64_t pack_compact_panel(const void *src, int64_t n, int64_t k, bool gated, void *out, Exception *exceptions,
                           int64_t room, int64_t panel) {
    static thread_local std::vector<uint16_t> values;
    values.resize(PANEL * k);
    pack_floats<Bfloat16>(static_cast<const uint16_t *>(src), n, k, gated, values.data(), panel);
    return compact_panel(values.data(), k, static_cast<uint8_t *>(out) + panel * compact_bytes(k), exceptions, room);
}

void pack_panel(int64_t format, const void *src, int64_t n, int64_t k, bool gated, void *out, int64_t panel) {
    const int64_t at = panel * PANEL * k;
    if (format == PANEL_F32)
        pack_floats<Float32>(static_cast<const float *>(src), n, k, gated, static_cast<float *>(out) + at, panel);
    else
        pack_floats<Bfloat16>(static_cast<const uint16_t *>(src), n, k, gated, static_cast<uint16_t *>(out) + at,
                              panel);
}

}  // namespace llmtool
