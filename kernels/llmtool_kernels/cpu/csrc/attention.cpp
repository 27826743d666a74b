#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "attention_plan.h"
#include "page.h"
#include "transpose.h"

namespace llmtool {
namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Memory of a thread that only grows.
template <class T>
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    T *get(int64_t count) {
        if (count > capacity_) {
            std::free(data_);
            capacity_ = (count + 31) / 32 * 32;
            data_ = static_cast<T *>(std::aligned_alloc(64, capacity_ * sizeof(T)));
        }
        return data_;
    }

  private:
    T *data_ = nullptr;
    int64_t capacity_ = 0;
};

template <class T>
struct Workspace {
    Scratch<T> queries, keys, values, zeros;
    Scratch<float> state;
};

// Running softmax of a block's rows: maximum and sum of each, then each row's weighted values [padded v_dim].
struct State {
    float *maximum, *sum, *values;
    int64_t width;

    State(float *memory, int64_t rows, int64_t v_dim)
        : maximum(memory), sum(memory + rows), values(memory + 2 * rows),
          width(AttentionPlan::state_width(v_dim) - 2) {}

    void clear(int64_t rows) {
        std::fill_n(maximum, rows, NEVER);
        std::fill_n(sum, rows, 0.0f);
        std::fill_n(values, rows * width, 0.0f);
    }
};

// Factors that bring rows of two maxima to their common one.
struct Rescale {
    alignas(64) float old_factor[LANES], new_factor[LANES];

    Rescale(State &state, int64_t first, const float *maximum, const float *sum, int64_t rows) {
        f32x16 old_max = load_some(state.maximum + first, rows), new_max = load_some(maximum, rows);
        f32x16 both = max(old_max, new_max);
        f32x16 finite = both == NEVER ? f32x16{} : both;  // nothing seen yet: both factors come out as 0
        f32x16 a = exp(old_max - finite), b = exp(new_max - finite);
        store(old_factor, a);
        store(new_factor, b);
        store_some(state.maximum + first, both, rows);
        store_some(state.sum + first, load_some(state.sum + first, rows) * a + load_some(sum, rows) * b, rows);
    }
};

// Where keys and values of a piece's tokens lie, 32 a panel.
template <class T>
struct Rows {
    const T *k[PIECE], *v[PIECE];
    int64_t base, num_panels = 0;  // the first one's token
};

// One task: the queries of a block, for one KV head, over pieces of the keys.
template <class E>
class Task {
    using T = typename E::T;

  public:
    Task(const Attention &op, const Step &step, const AttentionItem &item, int64_t kv_head)
        : op_(op), batch_(step.batches[op.batch]), item_(item), kv_head_(kv_head), group_(op.heads / op.kv_heads),
          rows_(item.num_queries * group_), first_token_(batch_.query_start[item.sequence] + item.first_query),
          layout_{op.layer_offset, op.tokens_per_page, op.kv_heads, op.k_dim, op.v_dim} {
        int64_t queries = batch_.query_start[item.sequence + 1] - batch_.query_start[item.sequence];
        first_position_ = batch_.seq_lens[item.sequence] - queries + item.first_query;
    }

    int64_t rows() const { return rows_; }

    void gather_queries(T *queries) {
        queries_ = queries;
        for (int64_t i = 0; i < item_.num_queries; i++) {
            const T *q = static_cast<const T *>(op_.q) + (first_token_ + i) * op_.q_stride;
            std::copy_n(q + kv_head_ * group_ * op_.k_dim, group_ * op_.k_dim, queries + i * group_ * op_.k_dim);
        }
    }

    // upcoming: rows to fetch meanwhile, of the piece this thread is likely to run next; or null.
    void run_piece(int64_t piece, const T *zero, Workspace<T> &workspace, State &state, const Rows<T> *upcoming) {
        pack(piece, zero, workspace);
        upcoming_ = upcoming;
        for (int64_t row = 0; row < rows_; row += MAX_TILE_ROWS) {
            with_rows(std::min<int64_t>(MAX_TILE_ROWS, rows_ - row),
                      [&](auto rows) { run_rows<decltype(rows)::value>(row, state); });
            upcoming_ = nullptr;
        }
    }

    // The rows of a piece; `zero` stands for tokens around those that a query of the block sees.
    void locate(int64_t piece, const T *zero, Rows<T> &rows) const {
        int64_t begin = piece * PIECE, oldest = first_visible(first_position_);
        int64_t newest = first_position_ + item_.num_queries - 1;
        int64_t first = std::max(begin, oldest), last = std::min(begin + PIECE, newest + 1);
        // The base is aligned, so that a token's lane and unit do not depend on the other queries of the block.
        rows.base = begin + (first - begin) / PANEL * PANEL;
        rows.num_panels = (last - rows.base + PANEL - 1) / PANEL;
        std::fill_n(rows.k, rows.num_panels * PANEL, zero);
        std::fill_n(rows.v, rows.num_panels * PANEL, zero);
        const int32_t *table = batch_.block_tables + item_.sequence * batch_.table_width;
        for (int64_t token = first; token < last;) {
            int64_t page = token / op_.tokens_per_page, slot = token % op_.tokens_per_page;
            for (; slot < op_.tokens_per_page && token < last; slot++, token++) {
                const T *k = layout_.keys(batch_.arena, table[page], slot, kv_head_);
                const T *v = op_.latent ? k : layout_.values(batch_.arena, table[page], slot, kv_head_);
                rows.k[token - rows.base] = k;
                rows.v[token - rows.base] = v;
            }
        }
    }

    void write(const State &state) const {
        for (int64_t row = 0; row < rows_; row++) {
            int64_t token = first_token_ + row / group_, head = kv_head_ * group_ + row % group_;
            T *out = static_cast<T *>(op_.out) + token * op_.out_stride + head * op_.v_dim;
            float sum = state.sum[row], scale = 1.0f;
            if (op_.sinks) {
                float top = std::max(state.maximum[row], op_.sinks[head]);
                scale = std::exp(state.maximum[row] - top);
                sum = sum * scale + std::exp(op_.sinks[head] - top);
            }
            const float *values = state.values + row * state.width;
            for (int64_t i = 0; i < op_.v_dim; i += LANES) {
                f32x16 v = load<f32x16>(values + i) * (scale / sum);
                if (i + LANES <= op_.v_dim)
                    store_f32(out + i, v);
                else
                    store_some(out + i, v, op_.v_dim - i);
            }
        }
    }

  private:
    int64_t first_visible(int64_t position) const {
        return op_.window ? std::max<int64_t>(0, position - op_.window + 1) : 0;
    }
    int64_t position(int64_t row) const { return first_position_ + row / group_; }

    // Keys and values of a piece into panels.
    void pack(int64_t piece, const T *zero, Workspace<T> &workspace) {
        const int64_t v_panels = (op_.v_dim + PANEL - 1) / PANEL;
        keys_ = workspace.keys.get(PIECE * op_.k_dim);
        values_ = workspace.values.get(PIECE * v_panels * PANEL);
        Rows<T> rows;
        locate(piece, zero, rows);
        base_ = rows.base;
        num_panels_ = rows.num_panels;
        const int64_t v_size = num_panels_ * PANEL * PANEL;
        for (int64_t p = 0; p < num_panels_; p++) {
            pack_keys<E>(rows.k + p * PANEL, op_.k_dim, keys_ + p * PANEL * op_.k_dim);
            for (int64_t panel = 0; panel < v_panels; panel++) {
                int64_t dim = panel * PANEL, count = std::min<int64_t>(PANEL, op_.v_dim - dim);
                T *out = values_ + panel * v_size + p * PANEL * PANEL;
                for (int i = 0; i < PANEL; i += E::KU)
                    pack_values(rows.v + p * PANEL + i, dim, count, out + i * PANEL);
            }
        }
    }

    // Rows [first, first + ROWS) over the packed piece, merged into the state.
    template <int ROWS>
    void run_rows(int64_t first, State &state) {
        alignas(64) float scores[ROWS][PIECE];
        alignas(64) T weights[ROWS][PIECE];
        alignas(64) float maximum[LANES], sum[LANES];
        int64_t oldest = first_visible(position(first)), newest = position(first + ROWS - 1);
        if (newest < base_) return;
        int64_t from = std::max<int64_t>(0, oldest - base_) / PANEL;
        int64_t to = std::min(num_panels_, (newest - base_) / PANEL + 1);
        if (from >= to) return;
        score<ROWS>(first, from, to, scores, maximum);
        for (int m = 0; m < ROWS; m++) {
            float top = maximum[m] == NEVER ? 0.0f : maximum[m];
            f32x16 total = {};
            for (int64_t i = from * PANEL; i < to * PANEL; i += LANES) {
                f32x16 w = exp(load<f32x16>(scores[m] + i) - top);
                total += w;
                store_f32(weights[m] + i, w);
            }
            sum[m] = reduce_add(total);
        }
        Rescale factors(state, first, maximum, sum, ROWS);
        for (int64_t panel = 0; panel * PANEL < op_.v_dim; panel++) {
            Accumulators<ROWS> acc = {};
            const T *values = values_ + panel * num_panels_ * PANEL * PANEL + from * PANEL * PANEL;
            const T *w = &weights[0][from * PANEL];
            const int64_t units = (to - from) * PANEL / E::KU;
            if (upcoming_ != nullptr && to <= upcoming_->num_panels)
                tile<E, ROWS>(w, PIECE, values, units, acc, FetchValues(upcoming_->v + from * PANEL, panel * PANEL));
            else
                tile<E, ROWS>(w, PIECE, values, units, acc, NoFetch());
            for (int m = 0; m < ROWS; m++) {
                float *v = state.values + (first + m) * state.width + panel * PANEL;
                for (int half = 0; half < 2; half++, v += LANES)
                    store(v, load<f32x16>(v) * factors.old_factor[m] + acc[m][half] * factors.new_factor[m]);
            }
        }
    }

    template <int ROWS>
    void score(int64_t first, int64_t from, int64_t to, float (*scores)[PIECE], float *maximum) {
        f32x16 top[ROWS];
        for (int m = 0; m < ROWS; m++) top[m] = splat(NEVER);
        for (int64_t p = from; p < to; p++) {
            Accumulators<ROWS> acc = {};
            const T *keys = keys_ + p * PANEL * op_.k_dim;
            const T *q = queries_ + first * op_.k_dim;
            if (upcoming_ != nullptr && p < upcoming_->num_panels)
                tile<E, ROWS>(q, op_.k_dim, keys, op_.k_dim / E::KU, acc, FetchKeys(upcoming_->k + p * PANEL, op_.k_dim));
            else
                tile<E, ROWS>(q, op_.k_dim, keys, op_.k_dim / E::KU, acc, NoFetch());
            int64_t token = base_ + p * PANEL;
            for (int m = 0; m < ROWS; m++) {
                int64_t newest = position(first + m), oldest = first_visible(newest);
                bool whole = oldest <= token && token + PANEL <= newest + 1;
                for (int half = 0; half < 2; half++) {
                    f32x16 s = acc[m][half] * float(op_.scale);
                    if (op_.softcap != 0) s = float(op_.softcap) * tanh(s / float(op_.softcap));
                    int64_t lane0 = token + half * LANES;
                    if (!whole) s = mask(s, int32_t(oldest - lane0), int32_t(newest - lane0));
                    top[m] = max(top[m], s);
                    store(scores[m] + p * PANEL + half * LANES, s);
                }
            }
        }
        for (int m = 0; m < ROWS; m++) maximum[m] = reduce_max(top[m]);
    }

    // Lanes before `oldest` and after `newest` are never seen.
    static f32x16 mask(f32x16 s, int32_t oldest, int32_t newest) {
        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        s = lane < oldest ? splat(NEVER) : s;
        return lane > newest ? splat(NEVER) : s;
    }

    // Pages lie anywhere: what comes next has to be fetched by name, a little with every unit of products. Both
    // bring what one panel holds while one panel is multiplied.
    struct FetchKeys {
        static constexpr int64_t LINE = 64 / sizeof(T);
        const T *const *rows;
        int64_t lines, inverse;  // in a row
        FetchKeys(const T *const *rows, int64_t k_dim)
            : rows(rows), lines((k_dim + LINE - 1) / LINE), inverse((65536 + lines - 1) / lines) {}
        void operator()(int64_t unit) const {
            for (int64_t line = 2 * unit; line < 2 * unit + 2; line++) {
                int64_t row = line * inverse >> 16;
                prefetch(rows[row] + (line - row * lines) * LINE);
            }
        }
    };

    struct FetchValues {
        const T *const *rows;
        int64_t dim;
        FetchValues(const T *const *rows, int64_t dim) : rows(rows), dim(dim) {}
        void operator()(int64_t unit) const {
            for (int i = 0; i < E::KU; i++)
                for (size_t at = 0; at < PANEL * sizeof(T); at += 64)
                    prefetch(reinterpret_cast<const char *>(rows[unit * E::KU + i] + dim) + at);
        }
    };

    const Attention &op_;
    const Batch &batch_;
    const AttentionItem &item_;
    const int64_t kv_head_, group_, rows_, first_token_;
    const PageLayout<T> layout_;
    int64_t first_position_ = 0, base_ = 0, num_panels_ = 0;
    T *queries_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
    const Rows<T> *upcoming_ = nullptr;
};

// The parts of a split item, merged in order into the first.
State merge(float *partials, int64_t parts, int64_t rows, int64_t v_dim) {
    const int64_t size = rows * AttentionPlan::state_width(v_dim);
    State whole(partials, rows, v_dim);
    for (int64_t part = 1; part < parts; part++) {
        State other(partials + part * size, rows, v_dim);
        for (int64_t first = 0; first < rows; first += LANES) {
            int64_t count = std::min<int64_t>(LANES, rows - first);
            Rescale factors(whole, first, other.maximum + first, other.sum + first, count);
            for (int64_t m = 0; m < count; m++) {
                float *into = whole.values + (first + m) * whole.width;
                const float *from = other.values + (first + m) * whole.width;
                for (int64_t i = 0; i < whole.width; i += LANES)
                    store(into + i, load<f32x16>(into + i) * factors.old_factor[m] +
                                        load<f32x16>(from + i) * factors.new_factor[m]);
            }
        }
    }
    return whole;
}

template <class E>
void run(const Attention &op, const Step &step, AttentionPlan &plan, int64_t task, int64_t next) {
    using T = typename E::T;
    static thread_local Workspace<T> workspace;
    const int64_t widest = std::max(op.k_dim, op.v_dim);
    T *zero = workspace.zeros.get(widest);
    std::fill_n(zero, widest, T(0));
    const AttentionItem &item = plan.items[task / op.kv_heads];
    const int64_t head = task % op.kv_heads;
    Task<E> block(op, step, item, head);
    const int64_t rows = block.rows(), size = rows * AttentionPlan::state_width(op.v_dim);
    float *partials = item.parts == 1 ? workspace.state.get(size)
                                      : plan.partials.data() + item.partial + head * item.parts * size;
    State state(partials + item.part * size, rows, op.v_dim);
    state.clear(rows);
    block.gather_queries(workspace.queries.get(rows * op.k_dim));
    for (int64_t piece = item.first; piece < item.last; piece++) {
        Rows<T> upcoming;
        if (piece + 1 < item.last) {
            block.locate(piece + 1, zero, upcoming);
        } else if (next >= 0) {
            const AttentionItem &other = plan.items[next / op.kv_heads];
            Task<E>(op, step, other, next % op.kv_heads).locate(other.first, zero, upcoming);
        }
        block.run_piece(piece, zero, workspace, state, upcoming.num_panels ? &upcoming : nullptr);
    }
    if (item.parts == 1) return block.write(state);
    // Whoever finishes last merges and writes; acquire and release make the others' parts visible to it.
    std::atomic<int32_t> &finished = plan.counters[item.counter + head];
    if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < item.parts) return;
    finished.store(0, std::memory_order_relaxed);  // the next layer starts at zero again
    block.write(merge(partials, item.parts, rows, op.v_dim));
}

}  // namespace

int64_t attention_tasks(const Attention &op, const AttentionPlan &plan) {
    return int64_t(plan.items.size()) * op.kv_heads;
}

void attention_task(const Attention &op, const Step &step, AttentionPlan &plan, int64_t task, int64_t next) {
    op.type == F32 ? run<Float32>(op, step, plan, task, next) : run<Bfloat16>(op, step, plan, task, next);
}

}  // namespace llmtool
