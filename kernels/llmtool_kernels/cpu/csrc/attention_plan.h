// How a step's attention is cut into tasks: by sequence, block of queries, and range of keys.
//
// Keys are looked at in pieces of PIECE tokens at fixed positions, each with a softmax of its own, and the pieces'
// results are merged in order. So a token's output depends on its own sequence alone, bit for bit: not on how a
// prompt was cut into chunks, on what else is in the batch, or on the number of threads.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "api.h"

namespace llmtool {

constexpr int64_t PIECE = 256;      // tokens
constexpr int64_t BLOCK_ROWS = 192;  // query rows (tokens times heads of a group) that share packed keys
constexpr int64_t SPLIT_ROWS = 64;   // up to so many rows, or for one query, the pieces are tasks of their own

// Queries [first_query, first_query + num_queries) of a sequence's new tokens over pieces [first, last).
struct AttentionItem {
    int64_t sequence, first_query, num_queries, first, last;
    // When the pieces are split over tasks: this one's number, how many there are, and where their partial
    // results and their counter lie; parts = 1 otherwise.
    int64_t part, parts, partial, counter;
};

class AttentionPlan {
  public:
    // Values per row of a partial result: maximum, sum, and the weighted values padded to whole panels.
    static int64_t state_width(int64_t v_dim);

    bool fits(const Attention &op) const;
    void make(const Attention &op, const Step &step);

    std::vector<AttentionItem> items;
    std::vector<float> partials;
    std::unique_ptr<std::atomic<int32_t>[]> counters;  // parts finished, per counter and KV head

  private:
    void add_blocks(const Attention &op, const Batch &batch, int64_t sequence);
    void add_split(AttentionItem item, int64_t rows, int64_t kv_heads);

    int64_t batch_ = -1, window_ = 0, group_ = 0, kv_heads_ = 0, v_dim_ = 0;
    int64_t num_counters_ = 0, counter_capacity_ = 0, partial_floats_ = 0;
};

}  // namespace llmtool
