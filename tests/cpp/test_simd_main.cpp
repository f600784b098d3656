// Runs the SIMD self test on every ISA this machine has, and tests the pick itself.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "check_main.h"
#include "common/isa.h"

namespace kd {
KD_DECLARE_PER_ISA(void test_simd())
}  // namespace kd

namespace {

template <class Fn>
std::string message_of(Fn fn) {
  try {
    fn();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void test_pick() {
  // The environment comes first: it is read by the first call.
  setenv("KDK_CPU_ISA", "sse9", 1);
  for (int call = 0; call < 2; ++call) {
    const std::string message = message_of([] { kd::current_isa(); });
    CHECK(message.find("KDK_CPU_ISA") != std::string::npos);
    CHECK(message.find("sse9") != std::string::npos);
    CHECK(message.find("baseline") != std::string::npos);
  }
  setenv("KDK_CPU_ISA", "baseline", 1);
  CHECK(kd::current_isa() == kd::Isa::kBaseline);
  CHECK(KD_PICK_ISA(test_simd) == &kd::baseline::test_simd);

  // Read once: a later change counts only from set_isa("").
  unsetenv("KDK_CPU_ISA");
  CHECK(kd::current_isa() == kd::Isa::kBaseline);
  kd::set_isa("");
  kd::Isa best = kd::Isa::kBaseline;
  for (kd::Isa isa : kd::kCompiledIsas) {
    if (kd::is_supported(isa)) best = isa;
  }
  CHECK(kd::current_isa() == best && std::strcmp(kd::isa_name(), kd::name(best)) == 0);

  CHECK(message_of([] { kd::set_isa("avx"); }).find("avx") != std::string::npos);
  CHECK(kd::current_isa() == best);  // a refused name changes nothing
  for (kd::Isa isa : {kd::Isa::kBaseline, kd::Isa::kAvx2, kd::Isa::kAvx512}) {
    const std::string message = message_of([isa] { kd::set_isa(kd::name(isa)); });
    CHECK(message.empty() == kd::is_supported(isa));
    if (kd::is_supported(isa)) CHECK(kd::current_isa() == isa);
  }
  CHECK(kd::is_supported(kd::Isa::kBaseline));
#if defined(__x86_64__)
  kd::set_isa("baseline");
  CHECK(KD_PICK_ISA(test_simd) == &kd::baseline::test_simd);
  if (kd::is_supported(kd::Isa::kAvx2)) {
    kd::set_isa("avx2");
    CHECK(KD_PICK_ISA(test_simd) == &kd::avx2::test_simd);
  }
  if (kd::is_supported(kd::Isa::kAvx512)) {
    kd::set_isa("avx512");
    CHECK(KD_PICK_ISA(test_simd) == &kd::avx512::test_simd);
  }
#endif
}

}  // namespace

int main() {
  test_pick();
  for (kd::Isa isa : kd::kCompiledIsas) {
    if (!kd::is_supported(isa)) {
      std::printf("%s: this machine cannot run it\n", kd::name(isa));
      continue;
    }
    kd::set_isa(kd::name(isa));
    std::printf("%s: ", kd::name(isa));
    KD_PICK_ISA(test_simd)();
  }
  return kd_test::check_result("test_simd");
}
