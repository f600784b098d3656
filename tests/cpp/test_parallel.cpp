// parallel_for over our own pool (torch is not loaded here), scratch and huge-page advice.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check_main.h"
#include "common/parallel.h"

namespace {

struct Piece {
  int64_t begin, end;
  bool operator<(const Piece& other) const { return begin < other.begin; }
};

// The pieces of one parallel_for; fails unless they cover [begin, end) exactly once.
std::set<Piece> pieces_of(int64_t begin, int64_t end, int64_t grain) {
  std::vector<std::atomic<int>> seen(end > begin ? end - begin : 0);
  std::vector<Piece> list(64);
  std::atomic<int> count{0};
  kd::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) {
    CHECK(begin <= b && b < e && e <= end);
    list[count++] = Piece{b, e};
    for (int64_t i = b; i < e; ++i) ++seen[i - begin];
  });
  for (const auto& times : seen) CHECK(times == 1);
  return std::set<Piece>(list.begin(), list.begin() + count);
}

void test_coverage() {
  for (int threads = 1; threads <= 8; ++threads) {
    kd::set_num_threads(threads);
    CHECK(kd::num_threads() == threads && kd::current_threads() == threads);
    CHECK(std::strcmp(kd::thread_pool_name(), threads == 1 ? "serial" : "own") == 0);
    for (int64_t count : {0, 1, 2, 3, 7, 8, 9, 64, 1000, 1001}) {
      for (int64_t grain : {0, 1, 3, 100, 5000}) {
        for (int64_t begin : {0, -5, 17}) {
          const std::set<Piece> pieces = pieces_of(begin, begin + count, grain);
          CHECK(static_cast<int>(pieces.size()) <= threads);
          for (const Piece& piece : pieces) {
            CHECK(piece.end - piece.begin >= grain || piece.end == begin + count);
          }
        }
      }
    }
    CHECK(pieces_of(5, 5, 1).empty() && pieces_of(5, 3, 1).empty());
    CHECK(static_cast<int>(pieces_of(0, 8 * threads, 1).size()) == threads);
  }
}

void test_runs_in_several_threads() {
  kd::set_num_threads(3);
  // Every piece waits for the two others: a serial run would never get past this.
  std::atomic<int> arrived{0};
  kd::parallel_for(0, 3, 1, [&](int64_t, int64_t) {
    ++arrived;
    while (arrived < 3) std::this_thread::yield();
  });
  CHECK(arrived == 3);
}

void test_exceptions() {
  for (int threads : {1, 2, 5}) {
    kd::set_num_threads(threads);
    for (int64_t bad : {0, 49, 99}) {  // in the caller's piece, in the middle, in a worker's
      std::atomic<int> visited{0};
      std::string message;
      try {
        kd::parallel_for(0, 100, 1, [&](int64_t b, int64_t e) {
          ++visited;
          if (b <= bad && bad < e) throw std::out_of_range("row " + std::to_string(bad));
        });
      } catch (const std::out_of_range& error) {
        message = error.what();
      }
      CHECK(message == "row " + std::to_string(bad));
      CHECK(visited == threads);  // the other pieces have run to their end
    }
    CHECK(kd::current_threads() == threads);  // the region was left
    CHECK(static_cast<int>(pieces_of(0, 100, 1).size()) == threads);
  }
}

void test_nesting() {
  kd::set_num_threads(4);
  std::atomic<int64_t> sum{0};
  kd::parallel_for(0, 8, 1, [&](int64_t b, int64_t e) {
    CHECK(kd::current_threads() == 1 && kd::num_threads() == 4);
    const std::thread::id outer = std::this_thread::get_id();
    for (int64_t i = b; i < e; ++i) {
      int calls = 0;
      kd::parallel_for(0, 100, 1, [&](int64_t inner_begin, int64_t inner_end) {
        CHECK(std::this_thread::get_id() == outer);
        ++calls;
        for (int64_t k = inner_begin; k < inner_end; ++k) sum += i * 100 + k;
      });
      CHECK(calls == 1);
    }
  });
  CHECK(sum == 800 * 799 / 2);
  CHECK(kd::current_threads() == 4);
}

void test_several_callers() {
  kd::set_num_threads(3);
  std::vector<std::thread> callers;
  std::atomic<int64_t> sum{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 300; ++round) {
        kd::parallel_for(0, 50, 1, [&](int64_t b, int64_t e) {
          for (int64_t i = b; i < e; ++i) sum += i;
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 4 * 300 * (50 * 49 / 2));
}

void test_fork() {
  kd::set_num_threads(3);
  pieces_of(0, 100, 1);  // the parent's pool has threads now
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang must fail, not block
    const bool good = pieces_of(0, 100, 1).size() == 3 && kd_test::failures == 0;
    _exit(good ? 0 : 1);
  }
  int status = -1;
  CHECK(child > 0 && waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void test_bad_counts() {
  for (int threads : {-1, 1 << 20}) {
    bool refused = false;
    try {
      kd::set_num_threads(threads);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
  kd::set_num_threads(0);
  CHECK(kd::num_threads() >= 1);
}

void test_scratch() {
  for (size_t bytes :
       {size_t{0}, size_t{1}, size_t{1000}, size_t{70000}, size_t{1100000}, kd::kScratchLimit}) {
    float* const p = kd::scratch(bytes);
    CHECK(p != nullptr && reinterpret_cast<uintptr_t>(p) % 64 == 0);
    std::memset(p, 0x5a, bytes);
    CHECK(kd::scratch(bytes) == p);  // no reallocation for what already fits
    CHECK(kd::scratch(bytes / 2) == p);
    CHECK(kd::block_scratch(bytes) != p && kd::scratch(bytes) == p);  // two buffers
  }
  bool refused = false;
  try {
    kd::scratch(kd::kScratchLimit + 1);
  } catch (const std::length_error&) {
    refused = true;
  }
  CHECK(refused);

  kd::set_num_threads(4);
  std::vector<float*> buffers(4, nullptr);
  std::atomic<int> arrived{0};
  kd::parallel_for(0, 4, 1, [&](int64_t b, int64_t) {
    buffers[b] = kd::scratch(4096);
    ++arrived;
    while (arrived < 4) std::this_thread::yield();
  });
  CHECK(std::set<float*>(buffers.begin(), buffers.end()).size() == 4);
}

void test_advise_huge() {
  std::vector<char> data(size_t{9} << 20, 7);
  kd::advise_huge(data.data() + 1, data.size() - 1);  // unaligned ends
  kd::advise_huge(data.data(), 100);                  // too small for a block
  kd::advise_huge(data.data(), 0);
  for (char byte : data) CHECK(byte == 7);
}

}  // namespace

int main() {
  test_coverage();
  test_runs_in_several_threads();
  test_exceptions();
  test_nesting();
  test_several_callers();
  test_fork();
  test_bad_counts();
  test_scratch();
  test_advise_huge();
  return kd_test::check_result("test_parallel");
}
