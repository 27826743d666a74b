// Products of integer weights with activations rounded to 16 bits: exact sums in int32, and no expansion of weights.
//
// A row's activations of one group of columns share a scale, its largest value over 32767. They come from bfloat16,
// whose own rounding of the largest of them is a hundred times coarser. A group's sum stays below
// 256 * 127 * 32767 < 2^31.
#pragma once
#include "expand.h"

#if defined(__AVX512VNNI__) && LLMTOOL_AVX512_BF16
#define LLMTOOL_AVX512_VNNI 1
#else
#define LLMTOOL_AVX512_VNNI 0
#endif

#if LLMTOOL_AVX512_VNNI

namespace llmtool {

// acc + the products of pairs. In assembly, since GCC 12 copies the accumulator before and after the intrinsic.
// Its type is not the intrinsics', which may alias anything and so is kept in memory.
LLMTOOL_INLINE i32x16 dot_pairs(i32x16 acc, __m512i a, __m512i b) {
    __m512i sum = bits<__m512i>(acc);
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return bits<i32x16>(sum);
}

// `count` values, a multiple of 8, into int16. Returns what a step of them is worth, NaN if one is not finite.
LLMTOOL_INLINE float round_group(const uint16_t *x, int64_t count, int16_t *q) {
    f32x16 top = {}, wrong = {};
    for (int64_t i = 0; i < count; i += LANES) {
        f32x16 v = load_lanes(x + i, count - i < LANES ? count - i : LANES);
        wrong += v * 0.0f;  // what is no number has no integer, and must not turn into one
        top = max(top, max(v, -v));
    }
    const float largest = reduce_max(top), inverse = largest > 0 ? 32767.0f / largest : 0.0f;
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t lanes = count - i < LANES ? count - i : LANES;
        __m512 v = bits<__m512>(load_lanes(x + i, lanes) * inverse);
        __m256i rounded = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v));
        std::memcpy(q + i, &rounded, lanes * sizeof(int16_t));
    }
    return largest / 32767.0f + reduce_add(wrong);
}

// Panels of int16, for tile(): the accumulators are int32.
struct Int16 {
    static constexpr int MOST_ROWS = 7;  // GCC 12 keeps the sums of more in memory
    using T = int16_t;
    using Sum = i32x16;
    static constexpr int KU = 2;
    using Line = __m512i;
    using Scalar = __m512i;
    LLMTOOL_INLINE Line line(const T *p) { return _mm512_loadu_si512(p); }
    LLMTOOL_INLINE Scalar scalar(const T *a) { return _mm512_set1_epi32(load<int32_t>(a)); }
    LLMTOOL_INLINE Sum mac(Sum acc, Scalar a, Line w) { return dot_pairs(acc, a, w); }
};

LLMTOOL_INLINE void expand(int64_t format, const uint8_t *q, int64_t k, int16_t *out) {
    if (format == PANEL_INT8) {
        for (int64_t i = 0; i < k * PANEL; i += 2 * LANES) {
            __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(q + i));
            _mm512_storeu_si512(out + i, _mm512_cvtepi8_epi16(bytes));
        }
        return;
    }
    for (int64_t unit = 0; unit < k / 2; unit += 4, q += 2 * PAIRS, out += 4 * PAIRS)
        for (int half = 0; half < 2; half++) {
            __m512i words = _mm512_loadu_si512(q + half * 64);
            for (int i = 0; i < 4; i++, words = _mm512_srli_epi16(words, 4)) {
                __m512i nibbles = _mm512_and_si512(words, _mm512_set1_epi16(15));
                _mm512_storeu_si512(out + i * PAIRS + half * 2 * LANES,
                                    _mm512_sub_epi16(nibbles, _mm512_set1_epi16(8)));
            }
        }
}

template <int ROWS>
using IntegerSums = i32x16[ROWS][2];

// What one line of 32 int16 weights, 16 columns of two k, adds.
template <int ROWS>
LLMTOOL_INLINE void add_lines(const int16_t *x, int64_t lda, __m512i w0, __m512i w1, IntegerSums<ROWS> &acc) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
        __m512i pair = _mm512_set1_epi32(load<int32_t>(x + m * lda));
        acc[m][0] = dot_pairs(acc[m][0], pair, w0);
        acc[m][1] = dot_pairs(acc[m][1], pair, w1);
    }
}

// acc[m] += sum over k of x[m, k] * panel[k, 0:32], packed as in expand.h. x: rows of int16 with stride lda.
template <int ROWS>
LLMTOOL_INLINE void int8_tile(const int16_t *x, int64_t lda, const uint8_t *panel, int64_t k, IntegerSums<ROWS> &acc) {
    for (int64_t unit = 0; unit < k / 2; unit++, panel += PAIRS) {
        const __m256i *bytes = reinterpret_cast<const __m256i *>(panel);
        __m512i w0 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(bytes));
        __m512i w1 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(bytes + 1));
        add_lines<ROWS>(x + 2 * unit, lda, w0, w1, acc);
    }
}

template <int ROWS>
LLMTOOL_INLINE void int4_tile(const int16_t *x, int64_t lda, const uint8_t *panel, int64_t k, IntegerSums<ROWS> &acc) {
    // The permutation looks at 5 bits of each word: the nibble, and one of the next, which the table ignores.
    alignas(64) static const int16_t values[32] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7,
                                                   -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const __m512i table = _mm512_load_si512(values);
    for (int64_t unit = 0; unit < k / 2; unit += 4, panel += 2 * PAIRS) {
        __m512i left = _mm512_loadu_si512(panel), right = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            add_lines<ROWS>(x + 2 * (unit + i), lda, _mm512_permutexvar_epi16(left, table),
                            _mm512_permutexvar_epi16(right, table), acc);
            left = _mm512_srli_epi16(left, 4);
            right = _mm512_srli_epi16(right, 4);
        }
    }
}

}  // namespace llmtool

#endif
