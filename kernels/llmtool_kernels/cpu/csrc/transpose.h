// Keys and values from pages into panels.
#pragma once
#include "panel.h"

#if defined(__AVX512F__) && !defined(LLMTOOL_PORTABLE)
#include <immintrin.h>
#define LLMTOOL_AVX512 1
#else
#define LLMTOOL_AVX512 0
#endif

namespace llmtool {

#if LLMTOOL_AVX512

// 16 x 16 words of 32 bits: out[word * stride + token] = rows[token][word].
LLMTOOL_INLINE void transpose_block(const uint32_t *const *rows, int64_t word, uint32_t *out, int64_t stride) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + word);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4 j + w]: rows 4 j .. 4 j + 3, words w, w + 4, w + 8, w + 12 in its four quarters.
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++) {
        __m512i a = _mm512_shuffle_i32x4(r[w], r[4 + w], 0x88), b = _mm512_shuffle_i32x4(r[w], r[4 + w], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(r[8 + w], r[12 + w], 0x88);
        __m512i d = _mm512_shuffle_i32x4(r[8 + w], r[12 + w], 0xdd);
        _mm512_storeu_si512(out + w * stride, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_storeu_si512(out + (w + 8) * stride, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_storeu_si512(out + (w + 4) * stride, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_storeu_si512(out + (w + 12) * stride, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}

#else

LLMTOOL_INLINE void transpose_block(const uint32_t *const *rows, int64_t word, uint32_t *out, int64_t stride) {
    for (int token = 0; token < 16; token++)
        for (int w = 0; w < 16; w++) out[w * stride + token] = rows[token][word + w];
}

#endif

// Keys of 32 tokens, k_dim elements each, into one panel [k_dim / KU][32][KU].
template <class E>
LLMTOOL_INLINE void pack_keys(const typename E::T *const *keys, int64_t k_dim, typename E::T *panel) {
    const uint32_t *rows[PANEL];
    for (int i = 0; i < PANEL; i++) rows[i] = reinterpret_cast<const uint32_t *>(keys[i]);
    uint32_t *out = reinterpret_cast<uint32_t *>(panel);
    int64_t words = k_dim / E::KU, word = 0;
    for (; word + 16 <= words; word += 16)
        for (int half = 0; half < 2; half++)
            transpose_block(rows + half * LANES, word, out + word * PANEL + half * LANES, PANEL);
    for (; word < words; word++)
        for (int token = 0; token < PANEL; token++) out[word * PANEL + token] = rows[token][word];
}

// Values of KU tokens, 32 dimensions from `dim` on of those there are, into one unit [32][KU].
LLMTOOL_INLINE void pack_values(const float *const *values, int64_t dim, int64_t count, float *unit) {
    if (count == PANEL) {
        std::memcpy(unit, values[0] + dim, PANEL * sizeof(float));
    } else {
        std::memset(unit, 0, PANEL * sizeof(float));
        std::memcpy(unit, values[0] + dim, count * sizeof(float));
    }
}

LLMTOOL_INLINE void pack_values(const uint16_t *const *values, int64_t dim, int64_t count, uint16_t *unit) {
    const uint16_t *even = values[0] + dim, *odd = values[1] + dim;
    if (count == PANEL) {
        for (int i = 0; i < PANEL; i++) {
            unit[2 * i] = even[i];
            unit[2 * i + 1] = odd[i];
        }
    } else {
        std::memset(unit, 0, 2 * PANEL * sizeof(uint16_t));
        for (int64_t i = 0; i < count; i++) {
            unit[2 * i] = even[i];
            unit[2 * i + 1] = odd[i];
        }
    }
}

}  // namespace llmtool
