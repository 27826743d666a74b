// Operations on rows: norms, and what lies between the qkv projection and attention.
#pragma once
#include "api.h"

namespace llmtool {

// Each runs rows [first, last).
void rms_norm_rows(const RmsNorm &op, int64_t first, int64_t last);
void write_kv_rows(const WriteKv &op, const Step &step, int64_t first, int64_t last);
void qkv_post_rows(const QkvPost &op, const Step &step, int64_t first, int64_t last);

}  // namespace llmtool
