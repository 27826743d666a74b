// Causal attention of a step's new tokens over paged keys and values.
#pragma once
#include <memory>
#include <vector>

#include "api.h"

namespace llmtool {

class AttentionPlan;

// The step's work for all layers alike in shape, window and batch. Plans are kept between steps for their memory.
class AttentionPlanner {
  public:
    AttentionPlanner();
    ~AttentionPlanner();
    void begin_step();
    AttentionPlan *plan(const Attention &op, const Step &step);

  private:
    std::vector<std::unique_ptr<AttentionPlan>> plans_;
    size_t used_ = 0;
};

int64_t attention_tasks(const Attention &op, const AttentionPlan &plan);
// next: the task this thread is likely to run next, or -1.
void attention_task(const Attention &op, const Step &step, AttentionPlan &plan, int64_t task, int64_t next);

}  // namespace llmtool
