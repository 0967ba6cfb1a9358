#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace hvpfast {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for `done` to hold, at most `tries` times: the first `spins` without giving up the core (a
// wake-up from sleep costs tens of microseconds), the others yielding it.
template <class Condition>
bool wait_until(Condition done, int64_t spins, int64_t tries) {
  for (int64_t i = 0; i < tries; ++i) {
    if (done()) return true;
    if (i < spins) {
      pause();
    } else {
      sched_yield();
    }
  }
  return false;
}
// Inside a region: a core yielded to another library's spinning thread comes back after
// milliseconds, so a member spins for about the length of a region first.
constexpr int64_t kRegionSpins = 20000;
constexpr int64_t kForever = INT64_MAX;
// Between regions: a worker spins, yields, then sleeps.
constexpr int64_t kIdleSpins = 200;
constexpr int64_t kIdleTries = 400;

class Pool {
 public:
  void run(int size, const std::function<void(Team&)>& body) {
    while (int(workers_.size()) < size - 1) {
      workers_.push_back(std::make_unique<Worker>());
      Worker* worker = workers_.back().get();
      worker->rank = int(workers_.size());
      std::thread([this, worker] { serve(worker); }).detach();
    }
    Team::Shared shared;
    body_ = &body;
    shared_ = &shared;
    size_ = size;
    gate_.store(kOpen, std::memory_order_release);
    for (int rank = 1; rank < size; ++rank) {
      Worker& worker = *workers_[size_t(rank - 1)];
      worker.calls.fetch_add(1, std::memory_order_release);
      worker.calls.notify_one();
    }
    Team team(0, size, &shared);
    body(team);
    // Nobody enters any more; those inside have no task left and are on their way out.
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
    wait_until([&] { return gate_.load(std::memory_order_acquire) == 0; }, kRegionSpins, kForever);
  }

 private:
  struct Worker {
    alignas(64) std::atomic<uint32_t> calls{0};
    int rank = 0;
  };

  void serve(Worker* worker) {
    uint32_t seen = 0;
    for (;;) {
      const auto called = [&] { return worker->calls.load(std::memory_order_acquire) != seen; };
      if (!wait_until(called, kIdleSpins, kIdleTries))
        worker->calls.wait(seen, std::memory_order_acquire);
      seen = worker->calls.load(std::memory_order_acquire);
      if (!enter()) continue;  // too late: the caller has done it all
      if (worker->rank < size_) {
        Team team(worker->rank, size_, shared_);
        (*body_)(team);
      }
      gate_.fetch_sub(1, std::memory_order_release);
    }
  }

  bool enter() {
    uint32_t gate = gate_.load(std::memory_order_acquire);
    while (gate & kOpen)
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  static constexpr uint32_t kOpen = uint32_t(1) << 31;
  std::vector<std::unique_ptr<Worker>> workers_;
  const std::function<void(Team&)>* body_ = nullptr;
  Team::Shared* shared_ = nullptr;
  int size_ = 0;
  alignas(64) std::atomic<uint32_t> gate_{0};  // kOpen, and the number of workers inside
};

struct Process {
  std::mutex busy;
  Pool* pool = new Pool;  // never destroyed: its threads are detached and sleep until the end
};

Process* process() {
  static Process* instance = [] {
    // A forked child has none of the threads: it starts with a new pool.
    static Process* p = new Process;
    pthread_atfork(nullptr, nullptr, [] {
      new (&p->busy) std::mutex;
      p->pool = new Pool;
    });
    return p;
  }();
  return instance;
}

}  // namespace

int Team::next_phase() {
  if (phase_ == kMostPhases) throw std::logic_error("too many phases in one parallel region");
  return phase_++;
}

void Team::wait(const std::atomic<int64_t>& done, int64_t count) {
  wait_until([&] { return done.load(std::memory_order_acquire) >= count; }, kRegionSpins, kForever);
}

// The OpenMP runtime that this process already has (torch brings one), or null. Its idle threads
// spin for milliseconds after a region: threads of our own beside them would wait that long for a
// core, while its own threads start at once. GOMP_parallel is libgomp's stable entry, which LLVM's
// runtime has as well.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
static OpenMpParallel openmp_parallel() {
  static const OpenMpParallel entry =
      reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

struct OpenMpJob {
  const std::function<void(Team&)>& body;
  int size;
  Team::Shared shared;
  std::atomic<int> members{0};

  static void member(void* data) {
    OpenMpJob& job = *static_cast<OpenMpJob*>(data);
    Team team(job.members.fetch_add(1, std::memory_order_relaxed), job.size, &job.shared);
    if (team.rank < team.size) job.body(team);
  }
};

void parallel(int threads, const std::function<void(Team&)>& body) {
  if (threads > 1) {
    if (const OpenMpParallel run = openmp_parallel()) {
      OpenMpJob job{body, threads, {}, {}};
      run(OpenMpJob::member, &job, unsigned(threads), 0);
      return;
    }
    Process* p = process();
    std::unique_lock<std::mutex> lock(p->busy, std::defer_lock);
    if (lock.try_lock()) return p->pool->run(threads, body);
  }
  Team::Shared shared;
  Team team(0, 1, &shared);
  body(team);
}

}  // namespace hvpfast
