// bfloat16 weights in 12 bits, exactly: reading them from memory is what a decode step waits for.
//
// Trained weights use few of bfloat16's 255 exponents. A panel keeps the 15 that it has most of in a table, and for
// each value its sign and mantissa (8 bits) and the number of its exponent (4 bits; number 0 is exponent 0: zero and
// what is below all exponents). The few values of other exponents are zero here and are kept beside, as exceptions
// whose products are added to a finished sum. The idea of coding only the exponent is DFloat11's (arXiv 2504.11651, section 2); fixed lengths in
// place of its Huffman code decode with four instructions for 32 values.
//
// Layout: the table, 64 bytes: the exponents in place, twice; then for every two units (four k) of a bfloat16 panel
// 128 bytes of signs and mantissas in the panel's order and 64 of numbers, the first unit's in the low nibbles.
#pragma once
#include <algorithm>
#include <numeric>

#include "api.h"
#include "panel.h"

namespace llmtool {

constexpr int64_t COMPACT_TABLE = 64;       // bytes
constexpr int64_t COMPACT_STEP = 192;       // bytes of four k
constexpr int COMPACT_UNIT = 2 * PANEL;     // values of two k
constexpr uint16_t SIGN_AND_MANTISSA = 0x807f, EXPONENT = 0x7f80;

LLMTOOL_INLINE int64_t compact_bytes(int64_t k) { return COMPACT_TABLE + k / 4 * COMPACT_STEP; }

LLMTOOL_INLINE uint16_t compact_value(uint8_t rest, uint16_t exponent) {
    return uint16_t((uint16_t(int16_t(int8_t(rest))) & SIGN_AND_MANTISSA) | exponent);
}

// Value `place` (column * 2 + k % 2) of a unit, as it is in the panel: zero for an exception.
LLMTOOL_INLINE uint16_t compact_at(const uint8_t *panel, int64_t unit, int place) {
    const uint8_t *step = panel + COMPACT_TABLE + unit / 2 * COMPACT_STEP;
    int number = step[2 * COMPACT_UNIT + place] >> (unit % 2 ? 4 : 0) & 15;
    return compact_value(step[unit % 2 * COMPACT_UNIT + place], load<uint16_t>(panel + 2 * number));
}

class CompactReader {
  public:
    LLMTOOL_INLINE_MEMBER explicit CompactReader(const uint8_t *panel) : step_(panel + COMPACT_TABLE) {
#if LLMTOOL_AVX512_BF16
        table_ = _mm512_loadu_si512(panel);
#else
        table_ = panel;
#endif
    }

    // use(line0, line1) for each of the next two units.
    template <class F>
    LLMTOOL_INLINE_MEMBER void two_units(F &&use) {
#if LLMTOOL_AVX512_BF16
        lines([&](__m512i left, __m512i right) { use(bits<__m512bh>(left), bits<__m512bh>(right)); });
#else
        uint16_t values[2 * COMPACT_UNIT];
        copy_two(values);
        for (const uint16_t *v : {values, values + COMPACT_UNIT}) use(Bfloat16::line(v), Bfloat16::line(v + PANEL));
#endif
    }

    // The next two units to `out`, as in a bfloat16 panel.
    LLMTOOL_INLINE_MEMBER void copy_two(uint16_t *out) {
#if LLMTOOL_AVX512_BF16
        lines([&](__m512i left, __m512i right) {
            _mm512_storeu_si512(out, left);
            _mm512_storeu_si512(out + PANEL, right);
            out += COMPACT_UNIT;
        });
#else
        for (int i = 0; i < COMPACT_UNIT; i++) {
            uint8_t numbers = step_[2 * COMPACT_UNIT + i];
            out[i] = compact_value(step_[i], load<uint16_t>(table_ + 2 * (numbers & 15)));
            out[COMPACT_UNIT + i] =
                compact_value(step_[COMPACT_UNIT + i], load<uint16_t>(table_ + 2 * (numbers >> 4)));
        }
        step_ += COMPACT_STEP;
#endif
    }

  private:
    const uint8_t *step_;
#if LLMTOOL_AVX512_BF16
    __m512i table_;

    // A permutation looks at 5 bits of a number: four are its own, and the table holds everything twice.
    LLMTOOL_INLINE_MEMBER __m512i widen_numbers(int64_t at) const {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(step_ + at)));
    }

    LLMTOOL_INLINE_MEMBER __m512i line(int64_t at, __m512i numbers) const {
        __m512i rest = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(step_ + at)));
        __m512i exponents = _mm512_permutexvar_epi16(numbers, table_);
        const __m512i mask = _mm512_set1_epi16(int16_t(SIGN_AND_MANTISSA));
        return _mm512_ternarylogic_epi64(rest, mask, exponents, 0xEA);  // rest & mask | exponents
    }

    template <class F>
    LLMTOOL_INLINE_MEMBER void lines(F &&use) {
        __m512i first = widen_numbers(2 * COMPACT_UNIT), second = widen_numbers(2 * COMPACT_UNIT + PANEL);
        use(line(0, first), line(PANEL, second));
        use(line(COMPACT_UNIT, _mm512_srli_epi16(first, 4)),
            line(COMPACT_UNIT + PANEL, _mm512_srli_epi16(second, 4)));
        step_ += COMPACT_STEP;
    }
#else
    const uint8_t *table_;
#endif
};

// acc[m] += the product with a panel of `units` units, an even number.
template <int ROWS, class Fetch>
LLMTOOL_INLINE void compact_tile(const uint16_t *a, int64_t lda, const uint8_t *panel, int64_t units,
                                 Accumulators<Bfloat16, ROWS> &acc, Fetch &&fetch) {
    UnitRows<Bfloat16, ROWS> rows(a, lda);
    CompactReader reader(panel);
    for (int64_t u = 0; u < units; u += 2) {
        fetch(u), fetch(u + 1);
        reader.two_units([&](Bfloat16::Line w0, Bfloat16::Line w1) {
            add_unit<Bfloat16, ROWS>(rows, w0, w1, acc);
            rows.next();
        });
    }
}

// The same for more rows than leave registers to decode in: a few units are decoded to memory, then multiplied, while
// the next are already being decoded. Unit u goes to out + u % period * COMPACT_UNIT; period: CHUNK, or all units, to
// keep them for other rows.
constexpr int64_t CHUNK = 8;      // units
constexpr int THROUGH_ROWS = 8;  // with more, their sums would not stay in registers

template <int ROWS, class Fetch>
LLMTOOL_INLINE void compact_tile_through(const uint16_t *a, int64_t lda, const uint8_t *panel, int64_t units,
                                         uint16_t *out, int64_t period, Accumulators<Bfloat16, ROWS> &acc,
                                         Fetch &&fetch) {
    UnitRows<Bfloat16, ROWS> rows(a, lda);
    CompactReader reader(panel);
    for (int64_t u = 0; u < units; u += CHUNK) {
        uint16_t *chunk = out + u % period * COMPACT_UNIT;
        const int64_t count = std::min(CHUNK, units - u);
        for (int64_t i = 0; i < count; i += 2) reader.copy_two(chunk + i * COMPACT_UNIT);
        for (int64_t i = 0; i < count; i++, rows.next()) {
            fetch(u + i);
            const uint16_t *w = chunk + i * COMPACT_UNIT;
            add_unit<Bfloat16, ROWS>(rows, Bfloat16::line(w), Bfloat16::line(w + PANEL), acc);
        }
    }
}

// Brings the panel that comes next into the cache: one line and a half for every unit.
struct FetchCompact {
    const uint8_t *next;
    LLMTOOL_INLINE_MEMBER void operator()(int64_t unit) const {
        const uint8_t *step = next + unit / 2 * COMPACT_STEP;
        if (unit % 2 == 0)
            prefetch(step);
        else
            prefetch(step + 64), prefetch(step + 128);
    }
};

// A bfloat16 panel into its compact form. Returns how many exceptions it has, of which the first `room` are written.
inline int64_t compact_panel(const uint16_t *values, int64_t k, uint8_t *out, Exception *exceptions, int64_t room) {
    const int64_t count = k * PANEL;
    int64_t counts[256] = {}, found = 0;
    for (int64_t i = 0; i < count; i++) counts[values[i] >> 7 & 255]++;
    counts[0] = 0;  // number 0's
    int order[256];
    std::iota(order, order + 256, 0);
    std::partial_sort(order, order + 15, order + 256, [&](int a, int b) {
        return counts[a] != counts[b] ? counts[a] > counts[b] : a < b;
    });
    uint16_t table[32] = {};
    uint8_t number[256] = {};
    for (int i = 1; i < 16; i++) {
        if (counts[order[i - 1]] == 0) break;
        table[i] = table[i + 16] = uint16_t(order[i - 1] << 7);
        number[order[i - 1]] = uint8_t(i);
    }
    std::memcpy(out, table, sizeof table);
    out += COMPACT_TABLE;
    for (int64_t unit = 0; unit < k / 2; unit++) {
        uint8_t *step = out + unit / 2 * COMPACT_STEP;
        for (int place = 0; place < COMPACT_UNIT; place++) {
            uint16_t v = values[unit * COMPACT_UNIT + place];
            uint8_t n = number[v >> 7 & 255], rest = uint8_t((v >> 8 & 0x80) | (v & 0x7f));
            if (n == 0 && v & EXPONENT) {
                rest = 0;
                if (found < room) exceptions[found] = {2 * unit + place % 2, place / 2, v};
                found++;
            }
            step[unit % 2 * COMPACT_UNIT + place] = rest;
            uint8_t &numbers = step[2 * COMPACT_UNIT + place];
            numbers = unit % 2 ? uint8_t(numbers | n << 4) : n;
        }
    }
    return found;
}

}  // namespace llmtool
