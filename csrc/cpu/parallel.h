// One thread pool for the process. A parallel region runs the same function on every member of a
// team; inside it, for_each hands out tasks and ends with a barrier. No result depends on who runs
// which task.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace hvpfast {

class Team {
 public:
  // State shared by the members of one team.
  struct Shared {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> epoch{0};
  };

  Team(int rank, int size, Shared* shared) : rank(rank), size(size), shared_(shared) {}

  const int rank;
  const int size;

  // body(i) once for every i in [0, count), by whichever member is free; all are done when it
  // returns.
  template <class Body>
  void for_each(int64_t count, Body&& body) {
    if (size == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    for (int64_t i; (i = shared_->next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
    barrier();
  }

 private:
  void barrier();
  Shared* shared_;
};

// Runs body on a team of at most `threads` members: of one member where the pool is busy with
// another caller.
void parallel(int threads, const std::function<void(Team&)>& body);

}  // namespace hvpfast
