// Vectors of 16 lanes. The compiler's own vector types, so that the same code runs on any instruction set;
// intrinsics only where bfloat16 has instructions of its own.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(LLMTOOL_PORTABLE)
#define LLMTOOL_AVX512_BF16 1
#include <immintrin.h>
#else
#define LLMTOOL_AVX512_BF16 0
#endif

#define LLMTOOL_INLINE static inline __attribute__((always_inline))
#define LLMTOOL_INLINE_MEMBER inline __attribute__((always_inline))

namespace llmtool {

constexpr int LANES = 16;

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

template <class V>
LLMTOOL_INLINE V load(const void *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
LLMTOOL_INLINE void store(void *p, V v) {
    std::memcpy(p, &v, sizeof v);
}

template <class To, class From>
LLMTOOL_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Bring a line into the cache. The empty statement says that this does something: else GCC takes a function that
// only prefetches for one without effect, and drops its calls.
LLMTOOL_INLINE void prefetch(const void *p) {
    __builtin_prefetch(p);
    asm volatile("");
}

LLMTOOL_INLINE f32x16 splat(float x) { return f32x16{} + x; }

// x in one lane, zero in the others; zero everywhere if there is no such lane.
LLMTOOL_INLINE f32x16 at_lane(int32_t lane, float x) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lanes == lane ? splat(x) : f32x16{};
}

LLMTOOL_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
LLMTOOL_INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }

LLMTOOL_INLINE float reduce_add(f32x16 v) {
    float x[LANES];
    store(x, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}

LLMTOOL_INLINE float reduce_max(f32x16 v) {
    float x[LANES];
    store(x, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    return x[0];
}

LLMTOOL_INLINE float bf16_to_f32(uint16_t x) { return bits<float>(uint32_t(x) << 16); }

// To nearest, ties to even; NaN stays NaN.
LLMTOOL_INLINE uint16_t f32_to_bf16(float x) {
    uint32_t u = bits<uint32_t>(x);
    return x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

LLMTOOL_INLINE f32x16 widen(u16x16 v) { return bits<f32x16>(__builtin_convertvector(v, u32x16) << 16); }

LLMTOOL_INLINE u16x16 narrow(f32x16 v) {
#if LLMTOOL_AVX512_BF16
    return bits<u16x16>(_mm512_cvtneps_pbh(bits<__m512>(v)));
#else
    u32x16 u = bits<u32x16>(v);
    u32x16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(v != v ? u32x16{} + 0x7fc0 : rounded, u16x16);
#endif
}

// 16 elements of E (float or uint16_t holding bfloat16) as float32, and back.
LLMTOOL_INLINE f32x16 load_f32(const float *p) { return load<f32x16>(p); }
LLMTOOL_INLINE f32x16 load_f32(const uint16_t *p) { return widen(load<u16x16>(p)); }
LLMTOOL_INLINE void store_f32(float *p, f32x16 v) { store(p, v); }
LLMTOOL_INLINE void store_f32(uint16_t *p, f32x16 v) { store(p, narrow(v)); }
LLMTOOL_INLINE float get(float x) { return x; }
LLMTOOL_INLINE float get(uint16_t x) { return bf16_to_f32(x); }
LLMTOOL_INLINE void put(float *p, float x) { *p = x; }
LLMTOOL_INLINE void put(uint16_t *p, float x) { *p = f32_to_bf16(x); }

// The first `count` < 16 elements, the other lanes 0; and storing so many.
template <class T>
LLMTOOL_INLINE f32x16 load_some(const T *p, int64_t count) {
    T padded[LANES] = {};
    std::memcpy(padded, p, count * sizeof(T));
    return load_f32(padded);
}

template <class T>
LLMTOOL_INLINE void store_some(T *p, f32x16 v, int64_t count) {
    T all[LANES];
    store_f32(all, v);
    std::memcpy(p, all, count * sizeof(T));
}

// `count` <= 16 of them; with 16 a whole vector.
template <class T>
LLMTOOL_INLINE f32x16 load_lanes(const T *p, int64_t count) {
    return count == LANES ? load_f32(p) : load_some(p, count);
}

template <class T>
LLMTOOL_INLINE void store_lanes(T *p, f32x16 v, int64_t count) {
    count == LANES ? store_f32(p, v) : store_some(p, v, count);
}

// e^x to about 1 ulp; 0 below -87, saturating above 88; NaN stays NaN.
LLMTOOL_INLINE f32x16 exp(f32x16 x) {
    const f32x16 round = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    f32x16 y = x > 88.0f ? splat(88.0f) : x;
    f32x16 t = y * 1.44269504f + round;
    f32x16 n = t - round;
    f32x16 r = y - n * 0.693359375f + n * 2.12194440e-4f;  // Cody and Waite: ln 2 in two parts
    f32x16 p = splat(1.9875691500e-4f);  // coefficients: Cephes, expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    i32x16 exponent = (bits<i32x16>(t) << 23) + 0x3f800000;
    f32x16 result = p * bits<f32x16>(exponent);
    return x < -87.0f ? f32x16{} : result;
}

LLMTOOL_INLINE f32x16 tanh(f32x16 x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }
LLMTOOL_INLINE f32x16 silu(f32x16 x) { return x / (1.0f + exp(-x)); }

// The tanh form of GELU, as Gemma uses it.
LLMTOOL_INLINE f32x16 gelu_tanh(f32x16 x) {
    return 0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}


// Abramowitz and Stegun, 7.1.26: an error of at most 1.5e-7.
LLMTOOL_INLINE f32x16 erf(f32x16 x) {
    f32x16 size = x < 0.0f ? -x : x;
    f32x16 t = 1.0f / (1.0f + 0.3275911f * size);
    f32x16 p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    f32x16 y = 1.0f - p * exp(-size * size);
    return x < 0.0f ? -y : y;
}

LLMTOOL_INLINE f32x16 gelu(f32x16 x) { return 0.5f * x * (1.0f + erf(0.70710678f * x)); }

}  // namespace llmtool
