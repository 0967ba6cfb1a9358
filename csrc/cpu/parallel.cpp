#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <memory>
#include <mutex>
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

// Waits for `done` to hold at most `tries` times: spins for a few microseconds (a wake-up from
// sleep costs tens of them), then yields in between, for the thread that is waited for may want
// this very core.
template <class Condition>
bool wait_until(Condition done, int64_t tries) {
  constexpr int64_t kSpins = 200;
  for (int64_t i = 0; i < tries; ++i) {
    if (done()) return true;
    if (i < kSpins) {
      pause();
    } else {
      sched_yield();
    }
  }
  return false;
}
constexpr int64_t kForever = INT64_MAX;
constexpr int64_t kIdleTries = 400;  // of a worker, before it sleeps

class Pool {
 public:
  void run(int size, const std::function<void(Team&)>& body) {
    while (int(workers_.size()) < size - 1) {
      workers_.push_back(std::make_unique<Worker>());
      Worker* worker = workers_.back().get();
      std::thread([this, worker] { serve(worker); }).detach();
    }
    Team::Shared shared;
    body_ = &body;
    shared_ = &shared;
    size_ = size;
    unfinished_.store(size - 1, std::memory_order_relaxed);
    for (int rank = 1; rank < size; ++rank) {
      Worker& worker = *workers_[rank - 1];
      worker.rank = rank;
      worker.calls.fetch_add(1, std::memory_order_release);
      worker.calls.notify_one();
    }
    Team team(0, size, &shared);
    body(team);
    wait_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; }, kForever);
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
      if (!wait_until(called, kIdleTries)) worker->calls.wait(seen, std::memory_order_acquire);
      ++seen;
      Team team(worker->rank, size_, shared_);
      (*body_)(team);
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  const std::function<void(Team&)>* body_ = nullptr;
  Team::Shared* shared_ = nullptr;
  int size_ = 0;
  std::atomic<int> unfinished_{0};
};

struct Process {
  std::mutex busy;
  Pool* pool =
      new Pool;  // never destroyed: its threads are detached and sleep until the process ends
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

void Team::barrier() {
  const uint32_t epoch = shared_->epoch.load(std::memory_order_acquire);
  if (shared_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    shared_->arrived.store(0, std::memory_order_relaxed);
    shared_->next.store(0, std::memory_order_relaxed);
    shared_->epoch.store(epoch + 1, std::memory_order_release);
  } else {
    wait_until([&] { return shared_->epoch.load(std::memory_order_acquire) != epoch; }, kForever);
  }
}

void parallel(int threads, const std::function<void(Team&)>& body) {
  Process* p = process();
  std::unique_lock<std::mutex> lock(p->busy, std::defer_lock);
  if (threads > 1 && lock.try_lock()) {
    p->pool->run(threads, body);
  } else {
    Team::Shared shared;
    Team team(0, 1, &shared);
    body(team);
  }
}

}  // namespace hvpfast
