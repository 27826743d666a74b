// Weights of 8 and 4 bits, turned into panels of E a group of k at a time, in the first-level cache.
//
// The integers are expanded as they are, exactly; their scale multiplies the group's sum of products. Packed
// like a bfloat16 panel: for every two k, 32 columns of pairs. INT8: a byte each. INT4: q + 8 in a nibble; eight
// k take 128 bytes, two for each 16-bit word of them: nibble i of word c belongs to unit i of the four, place c.
#pragma once
#include "compact.h"
#include "panel.h"

namespace llmtool {

constexpr int PAIRS = 2 * PANEL;  // values in a unit of two k

LLMTOOL_INLINE int64_t packed_bytes(int64_t format, int64_t k) {
    if (format == PANEL_COMPACT) return compact_bytes(k);
    const int64_t bits[] = {32, 16, 8, 4};
    return PANEL * k * bits[format] / 8;
}

#if LLMTOOL_AVX512_BF16

LLMTOOL_INLINE __m512 int8_as_f32(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}

LLMTOOL_INLINE void expand_int8(const int8_t *q, int64_t k, uint16_t *out) {
    for (int64_t i = 0; i < k * PANEL; i += 2 * LANES) {
        __m512bh pairs = _mm512_cvtne2ps_pbh(int8_as_f32(q + i + LANES), int8_as_f32(q + i));
        _mm512_storeu_si512(out + i, bits<__m512i>(pairs));
    }
}

LLMTOOL_INLINE void expand_int4(const uint8_t *q, int64_t k, uint16_t *out) {
    // The permutation looks at 5 bits of each word: the nibble, and one of the next, which the table ignores.
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = f32_to_bf16(float(i % 16 - 8));
    const __m512i table = _mm512_load_si512(values);
    for (int64_t unit = 0; unit < k / 2; unit += 4, q += 2 * PAIRS, out += 4 * PAIRS) {
        for (int half = 0; half < 2; half++) {
            __m512i words = _mm512_loadu_si512(q + half * 64);
            for (int i = 0; i < 4; i++) {
                __m512i line = _mm512_permutexvar_epi16(words, table);
                _mm512_storeu_si512(out + i * PAIRS + half * 2 * LANES, line);
                words = _mm512_srli_epi16(words, 4);
            }
        }
    }
}

#else

LLMTOOL_INLINE void expand_int8(const int8_t *q, int64_t k, uint16_t *out) {
    // Integers below 256 are exact in bfloat16: the low half of the float is zero.
    for (int64_t i = 0; i < k * PANEL; i++) out[i] = uint16_t(bits<uint32_t>(float(q[i])) >> 16);
}

LLMTOOL_INLINE void expand_int4(const uint8_t *q, int64_t k, uint16_t *out) {
    for (int64_t unit = 0; unit < k / 2; unit += 4, q += 2 * PAIRS, out += 4 * PAIRS)
        for (int i = 0; i < 4; i++)
            for (int c = 0; c < PAIRS; c++) {
                int nibble = load<uint16_t>(q + 2 * c) >> (4 * i) & 15;
                out[i * PAIRS + c] = uint16_t(bits<uint32_t>(float(nibble - 8)) >> 16);
            }
}

#endif

// Into panels of float32, which have one k a unit where the integers have two.
LLMTOOL_INLINE void expand_int8(const int8_t *q, int64_t k, float *out) {
    for (int64_t unit = 0; unit < k / 2; unit++)
        for (int c = 0; c < PANEL; c++)
            for (int odd = 0; odd < 2; odd++)
                out[(2 * unit + odd) * PANEL + c] = float(q[unit * PAIRS + 2 * c + odd]);
}

LLMTOOL_INLINE void expand_int4(const uint8_t *q, int64_t k, float *out) {
    for (int64_t unit = 0; unit < k / 2; unit++)
        for (int c = 0; c < PANEL; c++)
            for (int odd = 0; odd < 2; odd++) {
                uint16_t word = load<uint16_t>(q + unit / 4 * 2 * PAIRS + 2 * (2 * c + odd));
                out[(2 * unit + odd) * PANEL + c] = float((word >> (4 * (unit % 4)) & 15) - 8);
            }
}

template <class T>
LLMTOOL_INLINE void expand(int64_t format, const uint8_t *q, int64_t k, T *out) {
    if (format == 2)
        expand_int8(reinterpret_cast<const int8_t *>(q), k, out);
    else
        expand_int4(q, k, out);
}

}  // namespace llmtool
