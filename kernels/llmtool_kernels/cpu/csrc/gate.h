// How a gated MLP joins gate and up.
#pragma once
#include "api.h"
#include "simd.h"

namespace llmtool {

LLMTOOL_INLINE f32x16 join(const Gate &gate, f32x16 g, f32x16 up) {
    switch (gate.kind) {
        case SILU: return silu(g) * up;
        case GELU_TANH: return gelu_tanh(g) * up;
        case GELU: return gelu(g) * up;
        default: break;
    }
    f32x16 limit = splat(float(gate.limit));
    g = min(g, limit);
    up = max(min(up, limit), -limit);
    return g / (1.0f + exp(-float(gate.alpha) * g)) * (up + 1.0f);
}

}  // namespace llmtool
