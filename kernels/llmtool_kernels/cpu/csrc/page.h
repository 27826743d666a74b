// Where a layer's keys and values lie: KVLayout of attention.py.
#pragma once
#include <cstdint>

namespace llmtool {

constexpr int64_t UNIT = 512;  // bytes; block tables count in these

// Inside a page: K[slot, head, dim] of all slots, then V[slot, head, dim].
template <class T>
struct PageLayout {
    int64_t layer_offset, tokens_per_page, kv_heads, k_dim, v_dim;

    T *keys(uint8_t *arena, int64_t unit, int64_t slot, int64_t head) const {
        return layer(arena, unit) + (slot * kv_heads + head) * k_dim;
    }

    T *values(uint8_t *arena, int64_t unit, int64_t slot, int64_t head) const {
        return layer(arena, unit) + tokens_per_page * kv_heads * k_dim + (slot * kv_heads + head) * v_dim;
    }

  private:
    T *layer(uint8_t *arena, int64_t unit) const {
        return reinterpret_cast<T *>(arena + unit * UNIT + layer_offset);
    }
};

}  // namespace llmtool
