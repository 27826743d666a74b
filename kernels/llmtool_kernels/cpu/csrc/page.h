// Where a layer's keys and values lie: KVLayout of attention.py.
#pragma once
#include <cstdint>

namespace llmtool {

constexpr int64_t UNIT = 512;  // bytes; block tables count in these

// How a layer lies in its part of a page, K of all slots before V. ROWS: K[slot, head, dim], V[slot, head, dim].
// TILES, as the kernels read them (panel.h), for pages of a multiple of 16 slots and values of a multiple of 32
// dimensions: K[head, slot / 16, dim / KU, slot % 16, dim % KU] and V[head, slot / KU, dim, slot % KU].
enum Arrangement : int64_t { ROWS = 0, TILES = 1 };

template <class T>
struct PageLayout {
    int64_t layer_offset, tokens_per_page, kv_heads, k_dim, v_dim;

    T *keys(uint8_t *arena, int64_t unit, int64_t slot, int64_t head) const {
        return layer(arena, unit) + (slot * kv_heads + head) * k_dim;
    }

    T *values(uint8_t *arena, int64_t unit, int64_t slot, int64_t head) const {
        return layer(arena, unit) + tokens_per_page * kv_heads * k_dim + (slot * kv_heads + head) * v_dim;
    }

    // TILES: keys of the 16 slots around `slot`; values of the KU around it.
    T *key_tile(uint8_t *arena, int64_t unit, int64_t slot, int64_t head) const {
        return layer(arena, unit) + (head * tokens_per_page + slot / 16 * 16) * k_dim;
    }

    T *value_tile(uint8_t *arena, int64_t unit, int64_t slot, int64_t head) const {
        constexpr int64_t KU = 4 / sizeof(T);
        return layer(arena, unit) + tokens_per_page * kv_heads * k_dim +
               (head * tokens_per_page + slot / KU * KU) * v_dim;
    }

  private:
    T *layer(uint8_t *arena, int64_t unit) const {
        return reinterpret_cast<T *>(arena + unit * UNIT + layer_offset);
    }
};

}  // namespace llmtool
