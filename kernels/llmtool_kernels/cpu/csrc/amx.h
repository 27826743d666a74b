// Products of bfloat16 panels by the processor's tiles (AMX), 16 or 32 rows at a time.
//
// A panel is laid out as a tile wants its second operand: 16 units of two k are 16 lines of one half of its columns.
// LLMTOOL_AMX_EMULATED has plain code in the place of the instructions, so that tests run everywhere.
#pragma once
#include "panel.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && LLMTOOL_AVX512_BF16
#define LLMTOOL_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(LLMTOOL_AMX_EMULATED)
#define LLMTOOL_AMX 1
#else
#define LLMTOOL_AMX 0
#endif

#if LLMTOOL_AMX

namespace llmtool {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;
constexpr int64_t TILE_K = 32;  // bfloat16 values in a line of a tile

#ifndef LLMTOOL_AMX_EMULATED

// The system's leave to use tiles, asked for once; it may refuse.
LLMTOOL_INLINE bool tiles_allowed() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return allowed;
}

// All eight tiles whole. Others may have changed a thread's tiles since it was here last, so every task begins anew.
LLMTOOL_INLINE void tiles_begin() {
    alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
}
LLMTOOL_INLINE void tiles_end() { asm volatile("tilerelease"); }

// In assembly, since GCC's intrinsics are macros that take no template's number.
template <int TILE>
LLMTOOL_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
template <int TILE>
LLMTOOL_INLINE void tile_load(const void *p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
LLMTOOL_INLINE void tile_store(void *p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int C, int A, int B>
LLMTOOL_INLINE void tile_dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }

#else

struct EmulatedTile {
    uint8_t bytes[TILE_ROWS][TILE_BYTES];
};
inline thread_local EmulatedTile emulated_tiles[8];

LLMTOOL_INLINE bool tiles_allowed() { return true; }
LLMTOOL_INLINE void tiles_begin() { std::memset(emulated_tiles, 0xff, sizeof emulated_tiles); }
LLMTOOL_INLINE void tiles_end() {}

template <int TILE>
LLMTOOL_INLINE void tile_zero() { std::memset(&emulated_tiles[TILE], 0, sizeof(EmulatedTile)); }
template <int TILE>
LLMTOOL_INLINE void tile_load(const void *p, int64_t stride) {
    for (int row = 0; row < TILE_ROWS; row++)
        std::memcpy(emulated_tiles[TILE].bytes[row], static_cast<const uint8_t *>(p) + row * stride, TILE_BYTES);
}
template <int TILE>
LLMTOOL_INLINE void tile_store(void *p, int64_t stride) {
    for (int row = 0; row < TILE_ROWS; row++)
        std::memcpy(static_cast<uint8_t *>(p) + row * stride, emulated_tiles[TILE].bytes[row], TILE_BYTES);
}
template <int C, int A, int B>
LLMTOOL_INLINE void tile_dot() {
    for (int row = 0; row < TILE_ROWS; row++)
        for (int pair = 0; pair < TILE_ROWS; pair++)
            for (int column = 0; column < TILE_ROWS; column++) {
                uint8_t *at = emulated_tiles[C].bytes[row] + 4 * column;
                const uint8_t *a = emulated_tiles[A].bytes[row] + 4 * pair;
                const uint8_t *b = emulated_tiles[B].bytes[pair] + 4 * column;
                float sum = load<float>(at);
                for (int i = 0; i < 2; i++)
                    sum += bf16_to_f32(load<uint16_t>(a + 2 * i)) * bf16_to_f32(load<uint16_t>(b + 2 * i));
                store(at, sum);
            }
}

#endif

// out [ROWS, 32] = rows of x times a panel over k values, a multiple of TILE_K. ROWS: 16 or 32. stride: elements.
template <int ROWS>
LLMTOOL_INLINE void tile_product(const uint16_t *x, int64_t stride, const uint16_t *panel, int64_t k,
                                 float (*out)[PANEL]) {
    tile_zero<0>(), tile_zero<1>();
    if (ROWS == 32) tile_zero<2>(), tile_zero<3>();
    for (int64_t i = 0; i < k; i += TILE_K) {
        const uint16_t *b = panel + i * PANEL;
        tile_load<6>(b, 2 * TILE_BYTES);
        tile_load<7>(b + TILE_BYTES / 2, 2 * TILE_BYTES);
        tile_load<4>(x + i, 2 * stride);
        tile_dot<0, 4, 6>();
        tile_dot<1, 4, 7>();
        if (ROWS == 32) {
            tile_load<5>(x + TILE_ROWS * stride + i, 2 * stride);
            tile_dot<2, 5, 6>();
            tile_dot<3, 5, 7>();
        }
    }
    tile_store<0>(out[0], sizeof *out), tile_store<1>(out[0] + LANES, sizeof *out);
    if (ROWS == 32)
        tile_store<2>(out[TILE_ROWS], sizeof *out), tile_store<3>(out[TILE_ROWS] + LANES, sizeof *out);
}

}  // namespace llmtool

#endif
