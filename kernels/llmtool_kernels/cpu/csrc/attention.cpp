#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <utility>

#include "attention_plan.h"
#include "page.h"
#include "transpose.h"

namespace llmtool {
namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Memory of a thread that only grows, and is zero when it has grown.
template <class T>
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    T *get(int64_t count) {
        if (count > capacity_) {
            std::free(data_);
            capacity_ = (count + 31) / 32 * 32;
            data_ = static_cast<T *>(std::aligned_alloc(64, capacity_ * sizeof(T)));
            std::fill_n(data_, capacity_, T(0));
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

// The same as tiles: a panel's keys are two tiles of 16 tokens, whose units are k_stride elements apart; unit u of its
// values has dimensions [32 i, 32 i + 32) at v[u] + i * v_stride.
template <class E>
struct Tiles {
    const typename E::T *k[PIECE / LANES], *v[PIECE / E::KU];
    int64_t k_stride, v_stride, base, num_panels = 0;
};

// The memory of a piece in tiles, brought into the second-level cache two lines at a time while another is computed:
// it lies in blocks of some kilobytes, too short for the hardware to see a stream.
class Stream {
  public:
    void clear() { count_ = 0; }
    void add(const void *block, int64_t bytes) {
        if (count_ == MAX_BLOCKS) return;
        blocks_[count_] = static_cast<const char *>(block);
        bytes_[count_++] = bytes;
        if (count_ == 1) block_ = at_ = 0;
    }
    void operator()(int64_t) {
        if (block_ >= count_) return;
        const char *p = blocks_[block_] + at_;
        __builtin_prefetch(p, 0, 2);
        __builtin_prefetch(p + 64, 0, 2);
        asm volatile("");
        at_ += 128;
        if (at_ >= bytes_[block_]) block_++, at_ = 0;
    }

  private:
    static constexpr int64_t MAX_BLOCKS = 2 * PIECE / LANES;
    const char *blocks_[MAX_BLOCKS];
    int64_t bytes_[MAX_BLOCKS], count_ = 0, block_ = 0, at_ = 0;
};

// Quotients by a number without dividing: exact for numerators of 32 bits over divisors whose product with them
// is below 2^32.
struct Divisor {
    int64_t inverse;
    constexpr explicit Divisor(int64_t divisor) : inverse(((int64_t(1) << 32) + divisor - 1) / divisor) {}
    constexpr int64_t quotient(int64_t n) const { return n * inverse >> 32; }

    // Whether it is exact for all lines of a panel's keys, whatever their length up to `longest` lines.
    static constexpr bool divides_panels(int64_t longest) {
        for (int64_t lines = 1; lines <= longest; lines++)
            for (int64_t row = 0; row < PANEL; row++)
                if (Divisor(lines).quotient(row * lines) != row ||
                    Divisor(lines).quotient((row + 1) * lines - 1) != row)
                    return false;
        return true;
    }
};
static_assert(Divisor::divides_panels(256), "a key would be fetched from a row that is not there");

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
        context_ = batch_.seq_lens[item.sequence] - queries;
        first_position_ = context_ + item.first_query;
        if (batch_.tree != nullptr) tree_ = batch_.tree + first_token_;
        oldest_ = first_visible(tree_ ? context_ : first_position_);
        newest_ = tree_ ? context_ + queries - 1 : first_position_ + item.num_queries - 1;
    }

    int64_t rows() const { return rows_; }

    void gather_queries(T *queries) {
        queries_ = queries;
        for (int64_t i = 0; i < item_.num_queries; i++) {
            const T *q = static_cast<const T *>(op_.q) + (first_token_ + i) * op_.q_stride;
            std::copy_n(q + kv_head_ * group_ * op_.k_dim, group_ * op_.k_dim, queries + i * group_ * op_.k_dim);
        }
    }

    // Fetched meanwhile, of the piece this thread is likely to run next: rows, or a stream; or null.
    void run_piece(int64_t piece, const T *zero, Workspace<T> &workspace, State &state, const Rows<T> *upcoming,
                   Stream *stream) {
        stream_ = stream;
        if (op_.arrangement == TILES)
            find_tiles(piece, zero, workspace);
        else
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
        auto [first, last] = seen(piece);
        // The base is aligned, so that a token's lane and unit do not depend on the other queries of the block.
        rows.base = first / PANEL * PANEL;
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

    // A piece in tiles, to be fetched.
    void add_to(Stream &stream, int64_t piece) const {
        auto [first, last] = seen(piece);
        const int32_t *table = batch_.block_tables + item_.sequence * batch_.table_width;
        for (bool keys : {true, false})
            for (int64_t token = first / LANES * LANES; token < last; token += LANES) {
                int64_t unit = table[token / op_.tokens_per_page], slot = token % op_.tokens_per_page;
                if (keys)
                    stream.add(layout_.key_tile(batch_.arena, unit, slot, kv_head_), LANES * op_.k_dim * sizeof(T));
                else
                    stream.add(layout_.value_tile(batch_.arena, unit, slot, kv_head_), LANES * op_.v_dim * sizeof(T));
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
    // A node of a tree is at its depth: it sees itself and its ancestors.
    int64_t position(int64_t row) const {
        return tree_ ? context_ + __builtin_popcountll(tree_[row / group_]) - 1 : first_position_ + row / group_;
    }

    // The tokens [first, last) of a piece that a query of the block sees.
    std::pair<int64_t, int64_t> seen(int64_t piece) const {
        int64_t begin = piece * PIECE;
        return {std::max(begin, oldest_), std::min(begin + PIECE, newest_ + 1)};
    }

    // Pages in tiles are read as they are; `zero` stands for tiles without a token that is seen.
    void find_tiles(int64_t piece, const T *zero, Workspace<T> &workspace) {
        auto [first, last] = seen(piece);
        tiles_.base = first / PANEL * PANEL;
        tiles_.num_panels = (last - tiles_.base + PANEL - 1) / PANEL;
        tiles_.k_stride = LANES * E::KU;
        tiles_.v_stride = PANEL * E::KU;
        const int64_t tokens = tiles_.num_panels * PANEL;
        std::fill_n(tiles_.k, tokens / LANES, zero);
        std::fill_n(tiles_.v, tokens / E::KU, zero);
        const int32_t *table = batch_.block_tables + item_.sequence * batch_.table_width;
        for (int64_t token = first / LANES * LANES; token < last; token += LANES) {
            int64_t unit = table[token / op_.tokens_per_page], slot = token % op_.tokens_per_page;
            tiles_.k[(token - tiles_.base) / LANES] = layout_.key_tile(batch_.arena, unit, slot, kv_head_);
            const T *values = layout_.value_tile(batch_.arena, unit, slot, kv_head_);
            int64_t from = std::max<int64_t>(0, first - token) / E::KU * E::KU;
            int64_t to = std::min<int64_t>(LANES, last - token);
            for (int64_t i = from; i < to; i += E::KU) {
                const T *v = values + i * op_.v_dim;
                // Slots past the end may hold NaN, which a weight of zero does not hide.
                tiles_.v[(token + i - tiles_.base) / E::KU] = i + E::KU <= to ? v : first_of_pair(v, workspace);
            }
        }
    }

    // A unit of values whose second token is not there.
    const T *first_of_pair(const T *v, Workspace<T> &workspace) const {
        T *copy = workspace.values.get(op_.v_dim * E::KU);
        for (int64_t i = 0; i < op_.v_dim * E::KU; i += E::KU) {
            copy[i] = v[i];
            copy[i + E::KU - 1] = E::KU == 1 ? v[i] : T(0);
        }
        return copy;
    }

    // Keys and values of a piece into panels.
    void pack(int64_t piece, const T *zero, Workspace<T> &workspace) {
        const int64_t v_panels = (op_.v_dim + PANEL - 1) / PANEL;
        T *keys = workspace.keys.get(PIECE * op_.k_dim), *values = workspace.values.get(PIECE * v_panels * PANEL);
        Rows<T> rows;
        locate(piece, zero, rows);
        tiles_.base = rows.base;
        tiles_.num_panels = rows.num_panels;
        tiles_.k_stride = PANEL * E::KU;
        const int64_t v_size = tiles_.v_stride = rows.num_panels * PANEL * PANEL;
        for (int64_t u = 0; u < rows.num_panels * PANEL / E::KU; u++) tiles_.v[u] = values + u * PANEL * E::KU;
        for (int64_t p = 0; p < rows.num_panels; p++) {
            tiles_.k[2 * p] = keys + p * PANEL * op_.k_dim;
            tiles_.k[2 * p + 1] = tiles_.k[2 * p] + LANES * E::KU;
            pack_keys<E>(rows.k + p * PANEL, op_.k_dim, keys + p * PANEL * op_.k_dim);
            for (int64_t panel = 0; panel < v_panels; panel++) {
                int64_t dim = panel * PANEL, count = std::min<int64_t>(PANEL, op_.v_dim - dim);
                T *out = values + panel * v_size + p * PANEL * PANEL;
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
        int64_t oldest = tree_ ? oldest_ : first_visible(position(first));
        int64_t newest = tree_ ? newest_ : position(first + ROWS - 1);
        if (newest < tiles_.base) return;
        int64_t from = std::max<int64_t>(0, oldest - tiles_.base) / PANEL;
        int64_t to = std::min(tiles_.num_panels, (newest - tiles_.base) / PANEL + 1);
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
            Accumulators<E, ROWS> acc = {};
            const T *const *values = tiles_.v + from * PANEL / E::KU;
            const int64_t offset = panel * tiles_.v_stride;
            const T *w = &weights[0][from * PANEL];
            const int64_t units = (to - from) * PANEL / E::KU;
            if (upcoming_ != nullptr && to <= upcoming_->num_panels)
                tile<E, ROWS>(w, PIECE, values, offset, units, acc,
                              FetchValues(upcoming_->v + from * PANEL, panel * PANEL));
            else if (stream_ != nullptr && first == 0)
                tile<E, ROWS>(w, PIECE, values, offset, units, acc, *stream_);
            else
                tile<E, ROWS>(w, PIECE, values, offset, units, acc, NoFetch());
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
            Accumulators<E, ROWS> acc = {};
            const T *left = tiles_.k[2 * p], *right = tiles_.k[2 * p + 1];
            const T *q = queries_ + first * op_.k_dim;
            const int64_t units = op_.k_dim / E::KU;
            if (upcoming_ != nullptr && p < upcoming_->num_panels)
                tile<E, ROWS>(q, op_.k_dim, left, right, tiles_.k_stride, units, acc,
                              FetchKeys(upcoming_->k + p * PANEL, op_.k_dim));
            else if (stream_ != nullptr && first == 0)
                tile<E, ROWS>(q, op_.k_dim, left, right, tiles_.k_stride, units, acc, *stream_);
            else
                tile<E, ROWS>(q, op_.k_dim, left, right, tiles_.k_stride, units, acc, NoFetch());
            int64_t token = tiles_.base + p * PANEL;
            for (int m = 0; m < ROWS; m++) {
                int64_t newest = position(first + m), oldest = first_visible(newest);
                bool whole = oldest <= token && token + PANEL <= (tree_ ? context_ : newest + 1);
                for (int half = 0; half < 2; half++) {
                    f32x16 s = acc[m][half] * float(op_.scale);
                    if (op_.softcap != 0) s = float(op_.softcap) * tanh(s / float(op_.softcap));
                    int64_t lane0 = token + half * LANES;
                    if (!whole && tree_)
                        s = mask_tree(s, int32_t(oldest - lane0), lane0 - context_, tree_[(first + m) / group_]);
                    else if (!whole)
                        s = mask(s, int32_t(oldest - lane0), int32_t(newest - lane0));
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

    // Lanes before `oldest`, and of the new tokens, of which the first lane is number `node`, all but those in bits.
    static f32x16 mask_tree(f32x16 s, int32_t oldest, int64_t node, uint64_t bits) {
        alignas(64) int32_t seen[LANES];
        for (int64_t i = 0; i < LANES; i++)
            seen[i] = i >= oldest && (node + i < 0 || (node + i < 64 && (bits >> (node + i) & 1)));
        return load<i32x16>(seen) != 0 ? s : splat(NEVER);
    }

    // Pages lie anywhere: what comes next has to be fetched by name, a little with every unit of products. Both
    // bring what one panel holds while one panel is multiplied.
    struct FetchKeys {
        static constexpr int64_t LINE = 64 / sizeof(T);
        const T *const *rows;
        int64_t lines;  // in a row
        Divisor by_lines;
        FetchKeys(const T *const *rows, int64_t k_dim)
            : rows(rows), lines((k_dim + LINE - 1) / LINE), by_lines(lines) {}
        void operator()(int64_t unit) const {
            for (int64_t line = 2 * unit; line < 2 * unit + 2; line++) {
                int64_t row = by_lines.quotient(line);
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
    int64_t first_position_ = 0, context_ = 0;  // of the block's first query, of the sequence's first new token
    int64_t oldest_ = 0, newest_ = 0;  // the first and last token that any of the block sees
    const int64_t *tree_ = nullptr;    // bits of the block's queries
    T *queries_ = nullptr;
    Tiles<E> tiles_;
    const Rows<T> *upcoming_ = nullptr;
    Stream *stream_ = nullptr;
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
    const int64_t widest = std::max(op.k_dim * LANES, op.v_dim * E::KU);  // a tile of keys, a unit of values
    const T *zero = workspace.zeros.get(widest);
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
        bool more = piece + 1 < item.last;
        const AttentionItem &then = more || next < 0 ? item : plan.items[next / op.kv_heads];
        Task<E> upcoming(op, step, then, more ? head : next % op.kv_heads);
        int64_t its_piece = more ? piece + 1 : then.first;
        if (!more && next < 0) {
            block.run_piece(piece, zero, workspace, state, nullptr, nullptr);
        } else if (op.arrangement == TILES) {
            Stream stream;
            upcoming.add_to(stream, its_piece);
            block.run_piece(piece, zero, workspace, state, nullptr, &stream);
        } else {
            Rows<T> rows;
            upcoming.locate(its_piece, zero, rows);
            block.run_piece(piece, zero, workspace, state, &rows, nullptr);
        }
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
