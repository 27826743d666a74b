// Panels: matrices cut into strips of 32 columns whose k runs outermost, so that a strip streams from memory.
//
// A panel of E holds, for each unit of k (one k of float32, two of bfloat16, as vdpbf16ps wants them), 32 columns
// times KU values: [units][32][KU]. One line of it per vector: every multiply-add takes its operands as they lie.
// Weights are stored as panels (their rows are the columns here); attention packs keys and values into panels.
//
// tile() is the one inner loop of all products. It adds up k in order, for each output alone, whatever the number
// of rows: a row's result does not depend on which other rows were computed with it.
#pragma once
#include <algorithm>

#include "simd.h"

namespace llmtool {

constexpr int PANEL = 2 * LANES;
constexpr int MAX_TILE_ROWS = 12;  // 24 accumulators, 2 panel lines and a broadcast fit 32 registers

struct Float32 {
    static constexpr int MOST_ROWS = MAX_TILE_ROWS;
    using T = float;
    static constexpr int KU = 1;
    using Sum = f32x16;
    using Line = f32x16;
    using Scalar = float;
    LLMTOOL_INLINE Line line(const T *p) { return load<f32x16>(p); }
    LLMTOOL_INLINE Scalar scalar(const T *a) { return *a; }
    LLMTOOL_INLINE f32x16 mac(f32x16 acc, Scalar a, Line w) { return acc + a * w; }
};

struct Bfloat16 {
    static constexpr int MOST_ROWS = MAX_TILE_ROWS;
    using T = uint16_t;
    using Sum = f32x16;
    static constexpr int KU = 2;
#if LLMTOOL_AVX512_BF16
    using Line = __m512bh;
    using Scalar = __m512bh;
    LLMTOOL_INLINE Line line(const T *p) { return bits<__m512bh>(_mm512_loadu_si512(p)); }
    LLMTOOL_INLINE Scalar scalar(const T *a) { return bits<__m512bh>(_mm512_set1_epi32(load<int32_t>(a))); }
    LLMTOOL_INLINE f32x16 mac(f32x16 acc, Scalar a, Line w) {
        return bits<f32x16>(_mm512_dpbf16_ps(bits<__m512>(acc), a, w));
    }
#else
    struct Pair {
        f32x16 even, odd;
    };
    struct Scalar {
        float even, odd;
    };
    using Line = Pair;
    LLMTOOL_INLINE Line line(const T *p) {
        u32x16 pairs = load<u32x16>(p);
        return {bits<f32x16>(pairs << 16), bits<f32x16>(pairs & 0xffff0000)};
    }
    LLMTOOL_INLINE Scalar scalar(const T *a) { return {bf16_to_f32(a[0]), bf16_to_f32(a[1])}; }
    LLMTOOL_INLINE f32x16 mac(f32x16 acc, Scalar a, Line w) { return acc + a.even * w.even + a.odd * w.odd; }
#endif
};

template <class E, int ROWS>
using Accumulators = typename E::Sum[ROWS][2];

struct NoFetch {
    void operator()(int64_t) const {}
};

// The rows of a product's left side, one unit after the other. Five rows share a pointer: addresses of the form pointer
// + stride * {0, 1, 2, 3, 4} cost an instruction nothing, while a pointer for each row would need more registers
// than there are. The empty statement keeps the compiler from making them all the same.
template <class E, int ROWS>
class UnitRows {
    using T = typename E::T;

  public:
    LLMTOOL_INLINE_MEMBER UnitRows(const T *a, int64_t lda) : lda_(lda), lda3_(3 * lda) {
        for (int i = 0; i < POINTERS; i++) pointer_[i] = a + 5 * i * lda;
    }
    LLMTOOL_INLINE_MEMBER void next() {
#pragma GCC unroll 4
        for (int i = 0; i < POINTERS; i++) {
            pointer_[i] += E::KU;
            asm("" : "+r"(pointer_[i]));
        }
    }
    LLMTOOL_INLINE_MEMBER typename E::Scalar operator[](int m) const {
        const T *p = pointer_[m / 5];
        return E::scalar(m % 5 == 3 ? p + lda3_ : p + m % 5 * lda_);
    }

  private:
    static constexpr int POINTERS = (ROWS + 4) / 5;
    const T *pointer_[POINTERS];
    const int64_t lda_, lda3_;
};

// acc[m] += what one unit adds, for its two lines of 16 columns.
template <class E, int ROWS>
LLMTOOL_INLINE void add_unit(const UnitRows<E, ROWS> &rows, typename E::Line w0, typename E::Line w1,
                             Accumulators<E, ROWS> &acc) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
        typename E::Scalar x = rows[m];
        acc[m][0] = E::mac(acc[m][0], x, w0);
        acc[m][1] = E::mac(acc[m][1], x, w1);
    }
}

// acc[m] += sum over `units` of a[m, k] * panel[k, 0:32]. a: rows of E with stride lda. The panel's two lines of a unit
// are at left and right, those of the next unit `stride` elements on. fetch(unit) is called for every unit, to bring
// two lines of what comes next into the cache: as many as a unit has.
template <class E, int ROWS, class Fetch>
LLMTOOL_INLINE void tile(const typename E::T *a, int64_t lda, const typename E::T *left, const typename E::T *right,
                         int64_t stride, int64_t units, Accumulators<E, ROWS> &acc, Fetch &&fetch) {
    UnitRows<E, ROWS> rows(a, lda);
    for (int64_t u = 0; u < units; u++, rows.next()) {
        typename E::Line w0 = E::line(left + u * stride), w1 = E::line(right + u * stride);
        fetch(u);
        add_unit<E, ROWS>(rows, w0, w1, acc);
    }
}

// The same for a panel whose units lie one after the other.
template <class E, int ROWS, class Fetch>
LLMTOOL_INLINE void tile(const typename E::T *a, int64_t lda, const typename E::T *panel, int64_t units,
                         Accumulators<E, ROWS> &acc, Fetch &&fetch) {
    constexpr int LINE = LANES * E::KU;
    UnitRows<E, ROWS> rows(a, lda);
    for (int64_t u = 0; u < units; u++, rows.next()) {
        typename E::Line w0 = E::line(panel + u * 2 * LINE), w1 = E::line(panel + u * 2 * LINE + LINE);
        fetch(u);
        add_unit<E, ROWS>(rows, w0, w1, acc);
    }
}

// The same for units that lie anywhere, each `offset` elements from its pointer.
template <class E, int ROWS, class Fetch>
LLMTOOL_INLINE void tile(const typename E::T *a, int64_t lda, const typename E::T *const *panel, int64_t offset,
                         int64_t units, Accumulators<E, ROWS> &acc, Fetch &&fetch) {
    constexpr int LINE = LANES * E::KU;
    UnitRows<E, ROWS> rows(a, lda);
    for (int64_t u = 0; u < units; u++, rows.next()) {
        typename E::Line w0 = E::line(panel[u] + offset), w1 = E::line(panel[u] + offset + LINE);
        fetch(u);
        add_unit<E, ROWS>(rows, w0, w1, acc);
    }
}

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Call f(Constant<rows>) for rows in 1..MOST.
template <int MOST = MAX_TILE_ROWS, class F>
LLMTOOL_INLINE void with_rows(int64_t rows, F &&f) {
    switch (rows) {
        case 1: return f(Constant<1>());
        case 2: return f(Constant<2>());
        case 3: return f(Constant<3>());
        case 4: return f(Constant<4>());
        case 5: return f(Constant<5>());
        case 6: return f(Constant<6>());
        case 7: return f(Constant<7>());
        case 8: return f(Constant<8>());
        case 9: return f(Constant<std::min(9, MOST)>());
        case 10: return f(Constant<std::min(10, MOST)>());
        case 11: return f(Constant<std::min(11, MOST)>());
        case 12: return f(Constant<std::min(12, MOST)>());
    }
}

}  // namespace llmtool
