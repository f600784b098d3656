#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/check.h"

namespace kd {

namespace {

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

thread_local bool t_in_region = false;

class RegionGuard {
 public:
  RegionGuard() : outer_(t_in_region) { t_in_region = true; }
  ~RegionGuard() { t_in_region = outer_; }

 private:
  bool outer_;
};

// One parallel_for: keeps the first exception, because none may cross the pool's frames.
struct Region {
  RangeBody body;
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void run(int64_t begin, int64_t end) noexcept {
    RegionGuard guard;
    try {
      body(begin, end, context);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }

  void rethrow() {
    if (error) std::rethrow_exception(error);
  }
};

// ---- torch's pool -------------------------------------------------------------------------------

// torch's stable C interface (2.10 and later); errors are reported as a non-zero return.
struct TorchPool {
  int32_t (*parallel_for)(int64_t, int64_t, int64_t, RangeBody, void*) = nullptr;
  int32_t (*get_num_threads)(uint32_t*) = nullptr;
};

// Null until torch is loaded. Found by name, so that neither building nor loading needs torch, and
// never loaded by us (RTLD_NOLOAD).
const TorchPool* torch_pool() {
  static TorchPool pool;
  static std::atomic<const TorchPool*> found{nullptr};
  if (const TorchPool* known = found.load(std::memory_order_acquire)) return known;
#if defined(__APPLE__)
  void* library = dlopen("libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_NOW);
#else
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
#endif
  if (library == nullptr) return nullptr;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  void* const run = dlsym(library, "torch_parallel_for");
  void* const count = dlsym(library, "torch_get_num_threads");
  if (run == nullptr || count == nullptr) {  // torch before 2.10
    dlclose(library);
    return nullptr;
  }
  pool.parallel_for = reinterpret_cast<decltype(pool.parallel_for)>(run);
  pool.get_num_threads = reinterpret_cast<decltype(pool.get_num_threads)>(count);
  found.store(&pool, std::memory_order_release);
  return &pool;
}

// ---- our own pool -------------------------------------------------------------------------------

class OwnPool {
 public:
  // Piece i goes to worker i - 1, piece 0 to the caller: the same cut for the same thread count.
  // False if another thread is using the pool.
  bool run(Region* region, int64_t begin, int64_t end, int pieces) {
    std::unique_lock<std::mutex> user(user_, std::try_to_lock);
    if (!user.owns_lock()) return false;
    const int64_t length = divide_up(end - begin, pieces);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < pieces - 1) {
        const int index = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, index, seen = generation_] { work(index, seen); });
      }
      region_ = region, begin_ = begin, end_ = end, length_ = length, pieces_ = pieces;
      running_ = pieces - 1;
      ++generation_;
    }
    start_.notify_all();
    region->run(begin, std::min(end, begin + length));
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= pieces_) continue;
      Region* const region = region_;
      const int64_t begin = begin_ + index * length_;
      const int64_t end = std::min(end_, begin + length_);
      lock.unlock();
      if (begin < end) region->run(begin, end);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex user_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  uint64_t generation_ = 0;
  Region* region_ = nullptr;
  int64_t begin_ = 0, end_ = 0, length_ = 0;
  int pieces_ = 0, running_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and
// starts over with a new pool.
std::atomic<OwnPool*> g_own_pool{nullptr};

OwnPool& own_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_own_pool.store(nullptr); });
  static_cast<void>(registered);
  OwnPool* pool = g_own_pool.load();
  if (pool != nullptr) return *pool;
  OwnPool* const fresh = new OwnPool;
  if (g_own_pool.compare_exchange_strong(pool, fresh)) return *fresh;
  delete fresh;
  return *pool;
}

// ---- thread counts ------------------------------------------------------------------------------

constexpr int kMaxThreads = 1024;
std::atomic<int> g_override{0};

// 0 if unset.
int kdk_threads() {
  static const int threads = [] {
    const char* text = std::getenv("KDK_THREADS");
    if (text == nullptr || *text == '\0') return 0;
    char* rest = nullptr;
    const long value = std::strtol(text, &rest, 10);
    KD_CHECK(*rest == '\0' && value >= 1 && value <= kMaxThreads,
             "KDK_THREADS: expected a whole number from 1 to ", kMaxThreads, ", got \"", text,
             "\"");
    return static_cast<int>(value);
  }();
  return threads;
}

int wanted_threads() {
  const int forced = g_override.load(std::memory_order_relaxed);
  return forced > 0 ? forced : kdk_threads();
}

int own_default_threads() {
  static const int threads = [] {
    // OpenMP allows a list for nested levels ("4,2"): the first number counts.
    const char* text = std::getenv("OMP_NUM_THREADS");
    const long value = text != nullptr ? std::strtol(text, nullptr, 10) : 0;
    if (value >= 1) return static_cast<int>(std::min<long>(value, kMaxThreads));
    const int cpus = static_cast<int>(std::thread::hardware_concurrency());
    return std::min(std::max(cpus, 1), kMaxThreads);
  }();
  return threads;
}

int threads_of(const TorchPool* torch) {
  const int wanted = wanted_threads();
  if (torch == nullptr) return wanted > 0 ? wanted : own_default_threads();
  uint32_t count = 1;
  if (torch->get_num_threads(&count) != 0) throw std::runtime_error("torch_get_num_threads failed");
  const int available = static_cast<int>(count);
  return wanted > 0 ? std::min(wanted, available) : available;
}

}  // namespace

void parallel_for_range(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t count = end - begin;
  if (count <= grain || t_in_region) {
    body(begin, end, context);
    return;
  }
  const TorchPool* const torch = torch_pool();
  const int threads = threads_of(torch);
  // Rounded down, so that an equal share is never shorter than the grain.
  const int pieces = static_cast<int>(std::min<int64_t>(threads, count / grain));
  Region region{body, context, {}, {}};
  if (pieces > 1 && torch != nullptr) {
    const auto run = [](int64_t b, int64_t e, void* r) { static_cast<Region*>(r)->run(b, e); };
    if (torch->parallel_for(begin, end, divide_up(count, pieces), run, &region) != 0) {
      throw std::runtime_error("torch_parallel_for failed");
    }
  } else if (pieces <= 1 || !own_pool().run(&region, begin, end, pieces)) {
    region.run(begin, end);
  }
  region.rethrow();
}

int num_threads() {
  return threads_of(torch_pool());
}

int current_threads() {
  return t_in_region ? 1 : num_threads();
}

void set_num_threads(int threads) {
  KD_CHECK(threads >= 0 && threads <= kMaxThreads, "threads: expected 0 (automatic) to ",
           kMaxThreads, ", got ", threads);
  g_override = threads;
}

const char* thread_pool_name() {
  const TorchPool* const torch = torch_pool();
  return threads_of(torch) == 1 ? "serial" : torch != nullptr ? "torch" : "own";
}

// ---- memory -------------------------------------------------------------------------------------

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  float* get(size_t bytes) {
    if (bytes > capacity_) grow(bytes);
    return static_cast<float*>(data_);
  }

 private:
  void grow(size_t bytes) {
    std::free(data_);
    data_ = nullptr, capacity_ = 0;
#if defined(__SANITIZE_ADDRESS__)
    const size_t size = (bytes + 63) / 64 * 64;  // as tight as alignment allows: overruns are seen
#else
    // Doubling, so that a thread that meets growing rows reallocates a few times at most.
    size_t size = size_t{64} << 10;
    while (size < bytes) size *= 2;
#endif
    const bool huge = size == kHugePage;
    data_ = std::aligned_alloc(huge ? kHugePage : 64, size);
    if (data_ == nullptr) throw std::bad_alloc();
    capacity_ = size;
    if (huge) advise_huge(data_, size);
  }

  void* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace

namespace {

void check_scratch(size_t bytes, size_t limit) {
  if (bytes <= limit) return;
  throw std::length_error("scratch: " + std::to_string(bytes) + " bytes, the limit is " +
                          std::to_string(limit));
}

}  // namespace

float* scratch(size_t bytes) {
  check_scratch(bytes, kScratchLimit);
  thread_local Scratch buffer;
  return buffer.get(std::max<size_t>(bytes, 1));
}

float* row_scratch(size_t bytes) {
  check_scratch(bytes, kRowScratchLimit);
  thread_local Scratch buffer;
  return buffer.get(std::max<size_t>(bytes, 1));
}

void advise_huge(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  // Without huge pages in the kernel this fails, and nothing is lost.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace kd
