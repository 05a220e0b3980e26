// Threads of our own instead of OpenMP's. Idle OpenMP threads spin and every region waits for all of them: beside a busy
// neighbour that made two threads 28 times as slow as one. Here the caller takes every part that no worker has begun, so
// it waits for nothing but work in progress. Waking a sleeper takes as long as 2 MB of reading, so within a Team (a whole
// decode step) workers stay awake between jobs, and parts of some KB pay.
#pragma once
#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

namespace dynact {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Pool {
 public:
  // What this thread's jobs may count on. The parts of a job depend on kOutside or not, never on who runs them.
  enum Mode { kOutside, kAlone, kTeam };

  // The process's pool. Threads do not survive a fork, so a child gets a new one; neither is ever destroyed, because
  // workers may outlive the statics of a process that exits.
  static Pool& get() {
    static std::once_flag once;
    std::call_once(once, [] {
      current() = new Pool;
      pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
    });
    return *current();
  }

  static Mode& mode() {
    thread_local Mode own = kOutside;
    return own;
  }

  // While it lives, many small jobs follow one another on this thread: workers stay awake if they are to help, and the
  // caller runs every part itself if not.
  class Team {
   public:
    Team(int64_t threads, bool help) : helped_(help && threads > 1), before_(mode()) {
      mode() = helped_ ? kTeam : kAlone;
      if (helped_) get().keep_awake(threads - 1);
    }
    ~Team() {
      if (helped_) --get().teams_;
      mode() = before_;
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

   private:
    bool helped_;
    Mode before_;
  };

  // Calls part(0) ... part(parts - 1), each once, on up to `parts` threads; returns when all are done.
  void run(int64_t parts, const std::function<void(int64_t)>& part) {
    std::unique_lock<std::mutex> alone(callers_, std::try_to_lock);
    if (!alone || mode() == kAlone || parts > kMost) {  // or another thread of the program holds the workers
      for (int64_t p = 0; p < parts; ++p) part(p);
      return;
    }
    part_ = &part;
    left_.store(parts);
    ticket_.store(++generation_ << 32 | static_cast<uint64_t>(parts) << 16);
    if (mode() == kOutside) wake(parts - 1);
    while (take()) {
    }
    wait_for_the_last();
  }

 private:
  static constexpr int64_t kMost = 0xffff;
  static constexpr int kSpins = 1 << 10;                      // some 50 us
  static constexpr std::chrono::microseconds kLinger{200};  // from one job to the next, and from one step to the next

  static Pool*& current() {
    static Pool* pool = nullptr;
    return pool;
  }

  // A ticket: the job's number, its parts, how many are taken.
  static bool open(uint64_t ticket) { return (ticket & 0xffff) < (ticket >> 16 & 0xffff); }

  // Runs one part, if there is one that nobody has begun.
  bool take() {
    uint64_t ticket = ticket_.load();
    while (open(ticket)) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      (*part_)(static_cast<int64_t>(ticket & 0xffff));  // the job can't end before this part has
      if (left_.fetch_sub(1) == 1 && waiting_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
      return true;
    }
    return false;
  }

  void wait_for_the_last() {
    for (int i = 0; i < kSpins && left_.load(); ++i) relax();
    if (!left_.load()) return;
    std::unique_lock<std::mutex> lock(mutex_);  // whoever has the last part may not be running
    waiting_.store(true);
    done_.wait(lock, [this] { return left_.load() == 0; });
    waiting_.store(false);
  }

  void wake(int64_t workers, bool team = false) {
    std::lock_guard<std::mutex> lock(mutex_);
    calls_ += team;
    for (; workers_ < workers; ++workers_) std::thread([this] { work(); }).detach();
    if (asleep_) wake_.notify_all();
  }

  void keep_awake(int64_t workers) {
    ++teams_;
    wake(workers, true);
  }

  void work() {
    using Clock = std::chrono::steady_clock;
    auto last = Clock::now();
    int64_t seen = 0;   // calls that were answered: one that comes just before falling asleep is not missed
    bool team = false;  // whether more jobs are likely to follow soon
    for (;;) {
      if (take()) {
        last = Clock::now(), team = teams_.load() > 0;
        continue;
      }
      for (int i = 0; i < 16 && !open(ticket_.load()); ++i) relax();
      if (team && Clock::now() - last < kLinger) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, [&] { return open(ticket_.load()) || calls_ != seen; });
      --asleep_;
      seen = calls_;
      last = Clock::now(), team = teams_.load() > 0;
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* part_ = nullptr;
  uint64_t generation_ = 0;
  int64_t workers_ = 0, asleep_ = 0, calls_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> left_{0};
  alignas(64) std::atomic<int64_t> teams_{0};
  std::atomic<bool> waiting_{false};
};

}  // namespace dynact
