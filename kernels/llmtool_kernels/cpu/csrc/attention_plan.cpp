#include "attention_plan.h"

#include <algorithm>

#include "attention.h"
#include "panel.h"

namespace llmtool {

int64_t AttentionPlan::state_width(int64_t v_dim) { return 2 + (v_dim + PANEL - 1) / PANEL * PANEL; }

bool AttentionPlan::fits(const Attention &op) const {
    return batch_ == op.batch && window_ == op.window && group_ == op.heads / op.kv_heads &&
           kv_heads_ == op.kv_heads && v_dim_ == op.v_dim;
}

void AttentionPlan::make(const Attention &op, const Step &step) {
    batch_ = op.batch, window_ = op.window, group_ = op.heads / op.kv_heads;
    kv_heads_ = op.kv_heads, v_dim_ = op.v_dim;
    items.clear();
    num_counters_ = partial_floats_ = 0;
    const Batch &batch = step.batches[op.batch];
    for (int64_t s = 0; s < batch.num_seqs; s++) add_blocks(op, batch, s);
    if (num_counters_ > counter_capacity_) {
        counters = std::make_unique<std::atomic<int32_t>[]>(num_counters_);
        counter_capacity_ = num_counters_;
    }
    for (int64_t i = 0; i < num_counters_; i++) counters[i].store(0, std::memory_order_relaxed);
    if (partial_floats_ > int64_t(partials.size())) partials.resize(partial_floats_);
}

void AttentionPlan::add_blocks(const Attention &op, const Batch &batch, int64_t sequence) {
    int64_t queries = batch.query_start[sequence + 1] - batch.query_start[sequence];
    int64_t start = batch.seq_lens[sequence] - queries;  // position of the first query
    bool few = queries * group_ <= SPLIT_ROWS || queries == 1;
    int64_t block = few ? queries : std::max<int64_t>(1, BLOCK_ROWS / group_);
    const bool tree = batch.tree != nullptr;  // a node may stand before or after any other
    for (int64_t q = 0; q < queries; q += block) {
        int64_t count = std::min(block, queries - q);
        int64_t from = start + (tree ? 0 : q), to = start + (tree ? queries : q + count) - 1;
        int64_t oldest = op.window ? std::max<int64_t>(0, from - op.window + 1) : 0;
        int64_t first = oldest / PIECE, last = to / PIECE + 1;
        AttentionItem item{sequence, q, count, first, last, 0, 1, 0, 0};
        if (few && last - first > 1)
            add_split(item, count * group_, op.kv_heads);
        else
            items.push_back(item);
    }
}

void AttentionPlan::add_split(AttentionItem item, int64_t rows, int64_t kv_heads) {
    int64_t first = item.first, parts = item.last - item.first;
    item.parts = parts;
    item.partial = partial_floats_;
    item.counter = num_counters_;
    for (int64_t part = 0; part < parts; part++) {
        item.part = part;
        item.first = first + part;
        item.last = item.first + 1;
        items.push_back(item);
    }
    partial_floats_ += kv_heads * parts * rows * state_width(v_dim_);
    num_counters_ += kv_heads;
}

AttentionPlanner::AttentionPlanner() = default;
AttentionPlanner::~AttentionPlanner() = default;

void AttentionPlanner::begin_step() { used_ = 0; }

AttentionPlan *AttentionPlanner::plan(const Attention &op, const Step &step) {
    for (size_t i = 0; i < used_; i++)
        if (plans_[i]->fits(op)) return plans_[i].get();
    if (used_ == plans_.size()) plans_.push_back(std::make_unique<AttentionPlan>());
    AttentionPlan *plan = plans_[used_++].get();
    plan->make(op, step);
    return plan;
}

}  // namespace llmtool
