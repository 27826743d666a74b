#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <new>
#include <system_error>
#include <thread>

namespace llmtool {
namespace {

constexpr int MAX_SPINS = 2000, MIN_SPINS = 50;  // some tens of microseconds, about one

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void futex_wait(std::atomic<int32_t> &word, int32_t seen) {
    syscall(SYS_futex, reinterpret_cast<int32_t *>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<int32_t> &word, int32_t count) {
    syscall(SYS_futex, reinterpret_cast<int32_t *>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

// Until done(word) holds: in a spin, then asleep, counted in `sleepers` so that whoever changes the word knows to
// wake. A change between the last look and the sleep is seen by the kernel, which then does not sleep. spins: how
// long this thread has learned to spin here; in vain, it takes the core from the thread it waits for.
template <class F>
void wait(std::atomic<int32_t> &word, std::atomic<int32_t> &sleepers, int &spins, F &&done) {
    for (int spin = 0; spin < spins; spin++) {
        if (done(word.load(std::memory_order_acquire))) {
            if (spin > 0) spins = std::min(2 * spins, MAX_SPINS);
            return;
        }
        pause();
    }
    spins = std::max(spins / 2, MIN_SPINS);
    sleepers.fetch_add(1);
    for (int32_t seen = word.load(); !done(seen); seen = word.load()) futex_wait(word, seen);
    sleepers.fetch_sub(1);
}

alignas(Team) unsigned char memory[sizeof(Team)];
Team *const team = [] {
    pthread_atfork(nullptr, nullptr, [] { new (memory) Team; });
    return new (memory) Team;
}();

uint64_t span(uint64_t first, uint64_t last) { return first << 32 | last; }

}  // namespace

void Phase::prepare(int64_t tasks, int64_t threads) {
    total_ = int32_t(tasks);
    done_.store(0, std::memory_order_relaxed);
    if (threads > capacity_) {
        parts_ = std::make_unique<Part[]>(threads);
        capacity_ = threads;
    }
    threads_ = threads;
    for (int64_t t = 0; t < threads; t++)
        parts_[t].span.store(span(tasks * t / threads, tasks * (t + 1) / threads), std::memory_order_relaxed);
}

bool Phase::take_own(int64_t thread, uint32_t &task, uint32_t &next) {
    std::atomic<uint64_t> &own = parts_[thread].span;
    uint64_t seen = own.load(std::memory_order_relaxed);
    for (;;) {
        uint32_t first = uint32_t(seen >> 32), last = uint32_t(seen);
        if (first >= last) return false;
        if (own.compare_exchange_weak(seen, span(first + 1, last), std::memory_order_relaxed)) {
            task = first;
            next = first + 1 < last ? first + 1 : 0;
            return true;
        }
    }
}

bool Phase::take_from(int64_t victim, uint32_t &task) {
    std::atomic<uint64_t> &part = parts_[victim].span;
    uint64_t seen = part.load(std::memory_order_relaxed);
    for (;;) {
        uint32_t first = uint32_t(seen >> 32), last = uint32_t(seen);
        if (first >= last) return false;
        if (part.compare_exchange_weak(seen, span(first, last - 1), std::memory_order_relaxed)) {
            task = last - 1;
            return true;
        }
    }
}

void Phase::finish(int32_t finished) {
    if (finished && done_.fetch_add(finished) + finished == total_) {
        if (sleepers_.load()) futex_wake(done_, INT_MAX);
        return;
    }
    static thread_local int spins = MAX_SPINS;
    wait(done_, sleepers_, spins, [&](int32_t done) { return done == total_; });
}

// Made when the library is loaded. A fork takes no thread along but the one that calls it, and may come while
// another's run holds the lock: the child begins with a team that has no helpers yet. What the old one had
// allocated is left alone, whatever state it was in.
Team &Team::instance() {
    return *team;
}

void Team::Job::work(int64_t thread) {
    for (int64_t p = 0; p < num_phases; p++)
        phases[p].work(thread, [&](int64_t task, int64_t next) { call(body, p, task, next); });
}

void Team::run_job(const std::vector<int64_t> &tasks, int64_t threads, Call call, void *body) {
    try {
        for (; num_helpers_ < threads - 1; num_helpers_++)
            std::thread([this, thread = num_helpers_ + 1] { help(thread); }).detach();
    } catch (const std::system_error &) {
        // A limit of threads or memory: the threads there are take the others' tasks too.
    }
    Job *job = free_job();
    job->num_phases = int64_t(tasks.size());
    if (job->num_phases > job->capacity) {
        job->phases = std::make_unique<Phase[]>(job->num_phases);
        job->capacity = job->num_phases;
    }
    for (int64_t p = 0; p < job->num_phases; p++) job->phases[p].prepare(tasks[p], threads);
    job->threads = threads;
    job->call = call;
    job->body = body;
    current_.store(job);
    generation_.fetch_add(1);
    if (parked_.load()) futex_wake(generation_, INT_MAX);
    job->work(0);
    current_.store(nullptr);
}

// A helper counts itself as a user before it looks whether the job is still current; here it is not, so whoever
// is not counted now will leave it alone.
Team::Job *Team::free_job() {
    for (auto &job : jobs_)
        if (job->users.load() == 0) return job.get();
    jobs_.push_back(std::make_unique<Job>());
    return jobs_.back().get();
}

void Team::help(int64_t thread) {
    int spins = MAX_SPINS;
    for (int32_t seen = 0;;) {
        wait(generation_, parked_, spins, [&](int32_t generation) { return generation != seen; });
        seen = generation_.load();
        Job *job = current_.load();
        if (job == nullptr) continue;
        job->users.fetch_add(1);
        if (current_.load() == job && thread < job->threads) job->work(thread);
        job->users.fetch_sub(1);
    }
}

}  // namespace llmtool
