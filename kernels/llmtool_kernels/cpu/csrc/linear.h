// y = x w^T over packed weights.
#pragma once
#include "api.h"

namespace llmtool {

// False for a combination of formats, types and shapes that linear_task does not run.
bool linear_valid(const Linear &op);
int64_t linear_tasks(const Linear &op, int64_t rows);
// next: the task this thread is likely to run next, or -1. serial: a number that only this run of the operation has.
void linear_task(const Linear &op, int64_t rows, int64_t task, int64_t next, uint64_t serial);

// out[i] = scale * row ids[i] of the table, for i in [first, last).
void embed_rows(const Embed &op, const int64_t *ids, int64_t first, int64_t last);

// Returns how many exceptions the panel has; the first `room` are written.
int64_t pack_compact_panel(const void *src, int64_t n, int64_t k, bool gated, void *out, Exception *exceptions,
                           int64_t room, int64_t panel);
void pack_panel(int64_t format, const void *src, int64_t n, int64_t k, bool gated, void *out, int64_t panel);

}  // namespace llmtool
