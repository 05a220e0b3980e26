// Threads of our own instead of OpenMP's. Idle OpenMP threads spin and every region waits for all of them: beside a busy
// neighbour that made two threads 28 times as slow as one. Here workers sleep, and the caller takes every part that no
// worker has begun, so it waits for nothing but work in progress.
#pragma once
#include <pthread.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

namespace dynact {

class Pool {
 public:
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

  // Calls part(0) ... part(parts - 1), each once, on up to `parts` threads; returns when all are done.
  void run(int64_t parts, const std::function<void(int64_t)>& part) {
    std::unique_lock<std::mutex> alone(callers_, std::try_to_lock);
    if (!alone) {  // another thread of the program holds the workers
      for (int64_t p = 0; p < parts; ++p) part(p);
      return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    for (; workers_ < parts - 1; ++workers_) std::thread([this] { work(); }).detach();
    part_ = &part;
    next_ = 0;
    parts_ = parts;
    wake_.notify_all();
    take_parts(lock);
    done_.wait(lock, [this] { return running_ == 0; });
    part_ = nullptr;
  }

 private:
  static Pool*& current() {
    static Pool* pool = nullptr;
    return pool;
  }

  // Runs parts until none is left to begin. The lock is held on entry and on return.
  void take_parts(std::unique_lock<std::mutex>& lock) {
    while (part_ && next_ < parts_) {
      int64_t p = next_++;
      ++running_;
      const auto* part = part_;
      lock.unlock();
      (*part)(p);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return part_ && next_ < parts_; });
      take_parts(lock);
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* part_ = nullptr;
  int64_t next_ = 0, parts_ = 0, running_ = 0, workers_ = 0;
};

}  // namespace dynact
