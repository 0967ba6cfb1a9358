// One set of threads for the process: those of the OpenMP runtime that is already loaded, or a pool
// of our own. A parallel region runs the same function on the members of a team; inside it,
// for_each hands out tasks. A phase ends when its tasks are done, not when every member has
// arrived: a member that the system does not run (another library's thread may spin on its core)
// delays nobody. No result depends on who runs which task.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace hvpfast {

class Team {
 public:
  static constexpr int kMostPhases = 16;  // for_each calls in one region

  // State shared by the members of one team.
  struct Shared {
    struct alignas(64) Phase {
      std::atomic<int64_t> next{0};
      alignas(64) std::atomic<int64_t> done{0};
    };
    Phase phases[kMostPhases];
  };

  Team(int rank, int size, Shared* shared) : rank(rank), size(size), shared_(shared) {}

  const int rank;
  const int size;

  // body(i) once for every i in [0, count), by whichever member is free; all are done when it
  // returns. Every member calls it with the same count.
  template <class Body>
  void for_each(int64_t count, Body&& body) {
    if (size == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    Shared::Phase& phase = shared_->phases[next_phase()];
    for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      body(i);
      phase.done.fetch_add(1, std::memory_order_release);
    }
    wait(phase.done, count);
  }

 private:
  int next_phase();
  static void wait(const std::atomic<int64_t>& done, int64_t count);

  Shared* shared_;
  int phase_ = 0;
};

// Runs body on a team of at most `threads` members; on one member where the pool is busy with
// another caller.
void parallel(int threads, const std::function<void(Team&)>& body);

}  // namespace hvpfast
