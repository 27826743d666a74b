#include <algorithm>
#include <atomic>
#include <vector>

#include "amx.h"
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "page.h"
#include "panel.h"
#include "team.h"

namespace llmtool {
namespace {

constexpr int64_t ROWS_A_TASK = 8;
constexpr int64_t MAX_HEAD = 1024;

// An operation of a step: its rows are known, and what it needs from the step is at hand.
struct Bound {
    const Op *op;
    int64_t rows, tasks;
    AttentionPlan *plan;
};

// Whether pages can hold a layer as they are said to.
template <class T>
bool arranged(const T &op) {
    return op.arrangement == ROWS ||
           (op.tokens_per_page % 16 == 0 && op.v_dim % PANEL == 0 && op.k_dim % 2 == 0);
}

bool valid(const Op &op) {
    switch (op.kind) {
        case LINEAR: return linear_valid(op.linear);
        case QKV_POST: return op.qkv_post.k_dim <= MAX_HEAD && arranged(op.qkv_post);
        case ATTENTION: {
            const Attention &a = op.attention;
            if (a.heads % a.kv_heads != 0 || (a.type == BF16 && a.k_dim % 2 != 0)) return false;
            return arranged(a) && !(a.latent && a.arrangement == TILES);
        }
        case RMS_NORM: return !op.rms_norm.add || op.rms_norm.out_type == F32;
        case EMBED: case WRITE_KV: return true;
        default: return false;
    }
}

Bound bind(const Op &op, const Step &step, AttentionPlanner &planner) {
    Bound bound{&op, op.rows == ROWS_ALL ? step.num_tokens : op.rows, 0, nullptr};
    if (op.kind == LINEAR) {
        bound.tasks = linear_tasks(op.linear, bound.rows);
    } else if (op.kind == ATTENTION) {
        bound.plan = planner.plan(op.attention, step);
        bound.tasks = attention_tasks(op.attention, *bound.plan);
    } else {
        bound.tasks = (bound.rows + ROWS_A_TASK - 1) / ROWS_A_TASK;
    }
    return bound;
}

void run_task(const Bound &bound, const Step &step, int64_t task, int64_t next, uint64_t serial) {
    const Op &op = *bound.op;
    int64_t first = task * ROWS_A_TASK, last = std::min(first + ROWS_A_TASK, bound.rows);
    switch (op.kind) {
        case EMBED: return embed_rows(op.embed, step.input_ids, first, last);
        case RMS_NORM: return rms_norm_rows(op.rms_norm, first, last);
        case LINEAR: return linear_task(op.linear, bound.rows, task, next, serial);
        case WRITE_KV: return write_kv_rows(op.write_kv, step, first, last);
        case QKV_POST: return qkv_post_rows(op.qkv_post, step, first, last);
        case ATTENTION: return attention_task(op.attention, step, *bound.plan, task, next);
    }
}

// What a calling thread keeps between steps, so that a step allocates nothing.
struct Workspace {
    std::vector<Bound> bound;
    std::vector<int64_t> tasks;
    AttentionPlanner planner;
};

}  // namespace
}  // namespace llmtool

using namespace llmtool;

int64_t llmtool_run(const Op *ops, int64_t num_ops, const Step *step, int64_t threads) {
    static thread_local Workspace workspace;
    Workspace &w = workspace;
    w.bound.clear();
    w.tasks.clear();
    w.planner.begin_step();
    int64_t most = 1;
    for (int64_t i = 0; i < num_ops; i++) {
        if (!valid(ops[i])) return i + 1;
        w.bound.push_back(bind(ops[i], *step, w.planner));
        w.tasks.push_back(w.bound.back().tasks);
        most = std::max(most, w.tasks.back());
    }
    static std::atomic<uint64_t> serials{1};
    const uint64_t first_serial = serials.fetch_add(num_ops, std::memory_order_relaxed);
    Team::instance().run(w.tasks, std::min(threads, most), [&](int64_t phase, int64_t task, int64_t next) {
        run_task(w.bound[phase], *step, task, next, first_serial + phase);
    });
    return 0;
}

void llmtool_pack(int64_t format, const void *src, int64_t n, int64_t k, int64_t gated, void *out, int64_t *counts,
                  Exception *exceptions, int64_t room, int64_t threads) {
    int64_t panels = (n + PANEL - 1) / PANEL;
    Team::instance().run({panels}, threads, [&](int64_t, int64_t panel, int64_t) {
        if (format == PANEL_COMPACT)
            counts[panel] =
                pack_compact_panel(src, n, k, gated != 0, out, exceptions + panel * room, room, panel);
        else
            pack_panel(format, src, n, k, gated != 0, out, panel);
    });
}

const char *llmtool_isa() {
#if LLMTOOL_AMX
    if (tiles_allowed()) return "amx";
#endif
    return LLMTOOL_AVX512_BF16 ? "avx512_bf16" : "portable";
}
