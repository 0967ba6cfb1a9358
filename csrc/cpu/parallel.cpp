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

// Waits until `done` holds: spins for some microseconds (a wake-up from sleep costs tens of them), then yields.
template <class Condition>
void spin_until(Condition done) {
  for (int i = 0; !done(); ++i) {
    if (i < 4000) {
      pause();
    } else {
      sched_yield();
    }
  }
}

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
    spin_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
  }

 private:
  struct Worker {
    alignas(64) std::atomic<uint32_t> calls{0};
    int rank = 0;
  };

  void serve(Worker* worker) {
    uint32_t seen = 0;
    for (;;) {
      for (int i = 0; i < 4000 && worker->calls.load(std::memory_order_acquire) == seen; ++i) pause();
      worker->calls.wait(seen, std::memory_order_acquire);
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
  Pool* pool = new Pool;  // never destroyed: its threads are detached and sleep until the process ends
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
    spin_until([&] { return shared_->epoch.load(std::memory_order_acquire) != epoch; });
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
