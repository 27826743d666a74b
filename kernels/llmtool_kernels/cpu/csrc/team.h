// A team of threads runs phases in order, each cut into tasks.
//
// Made for machines that are shared with other processes, where a barrier costs a time slice whenever one thread is
// off its core. The caller does all the work; the other threads help if they come. Each works through its own part
// of a phase's tasks, which lie next to each other in memory, then takes what others have left. A phase is over
// when its tasks are done, and a run when its last phase is: nobody is waited for who holds no task. A task held
// by a thread without a core is waited for in a short spin, then asleep, which frees a core for that thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace llmtool {

// The tasks of one phase.
class Phase {
  public:
    void prepare(int64_t tasks, int64_t threads);

    // Run tasks until none is left to take, then wait until all are done. f(task, next) runs one; next is the one
    // this thread is likely to take after it, or -1.
    template <class F>
    void work(int64_t thread, F &&f) {
        int32_t finished = 0;
        uint32_t task, next;
        while (take_own(thread, task, next)) {
            f(int64_t(task), next > task ? int64_t(next) : int64_t(-1));
            finished++;
        }
        for (int64_t i = 1; i < threads_; i++) {
            while (take_from((thread + i) % threads_, task)) {
                f(int64_t(task), int64_t(-1));
                finished++;
            }
        }
        finish(finished);
    }

  private:
    // Tasks [first, last) nobody has taken; the owner takes from the front, the others from the back.
    struct alignas(64) Part {
        std::atomic<uint64_t> span{0};
    };

    bool take_own(int64_t thread, uint32_t &task, uint32_t &next);
    bool take_from(int64_t victim, uint32_t &task);
    void finish(int32_t finished);

    alignas(64) std::atomic<int32_t> done_{0};
    std::atomic<int32_t> sleepers_{0};
    int32_t total_ = 0;
    std::unique_ptr<Part[]> parts_;
    int64_t capacity_ = 0, threads_ = 1;
};

class Team {
  public:
    // The process's team. It is never destroyed: its threads may outlive main.
    static Team &instance();

    // Run phases of tasks[0], tasks[1], ... tasks on up to `threads` threads, the caller one of them;
    // f(phase, task, next) runs a task. A caller that finds the team busy with another's run works alone.
    template <class F>
    void run(const std::vector<int64_t> &tasks, int64_t threads, F &&f) {
        std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (threads <= 1 || !lock) {
            for (size_t phase = 0; phase < tasks.size(); phase++)
                for (int64_t task = 0; task < tasks[phase]; task++)
                    f(int64_t(phase), task, task + 1 < tasks[phase] ? task + 1 : int64_t(-1));
            return;
        }
        auto call = [](void *body, int64_t phase, int64_t task, int64_t next) {
            (*static_cast<std::remove_reference_t<F> *>(body))(phase, task, next);
        };
        run_job(tasks, threads, call, &f);
    }

  private:
    using Call = void (*)(void *body, int64_t phase, int64_t task, int64_t next);

    // One run. A thread that comes late may still look at it when the next run has begun, so each run has its own
    // and it is used again when nobody looks; `body` is only touched by who holds a task.
    struct Job {
        std::atomic<int32_t> users{0};
        std::unique_ptr<Phase[]> phases;
        int64_t num_phases = 0, capacity = 0, threads = 0;
        Call call = nullptr;
        void *body = nullptr;

        void work(int64_t thread);
    };

    void run_job(const std::vector<int64_t> &tasks, int64_t threads, Call call, void *body);
    Job *free_job();
    void help(int64_t thread);

    std::mutex mutex_;
    std::vector<std::unique_ptr<Job>> jobs_;
    int64_t num_helpers_ = 0;
    alignas(64) std::atomic<Job *> current_{nullptr};
    std::atomic<int32_t> generation_{0}, parked_{0};
};

}  // namespace llmtool
