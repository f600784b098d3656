#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "common/check.h"

namespace kd {

namespace {

#if defined(__x86_64__)
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool cpu_supports(Isa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::kBaseline;
}

std::string supported_names() {
  std::string names;
  for (Isa isa : kCompiledIsas) {
    if (is_supported(isa)) names += std::string(names.empty() ? "" : ", ") + name(isa);
  }
  return names;
}

Isa parse(const char* text, const char* source) {
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(text, name(isa)) != 0) continue;
    KD_CHECK(is_supported(isa), source, ": this machine cannot run \"", text, "\", it can run ",
             supported_names());
    return isa;
  }
  detail::fail(source, ": unknown instruction set \"", text, "\", expected one of ",
               supported_names());
}

Isa automatic_isa() {
  const char* forced = std::getenv("KDK_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return parse(forced, "KDK_CPU_ISA");
  Isa best = Isa::kBaseline;
  for (Isa isa : kCompiledIsas) {
    if (is_supported(isa)) best = isa;
  }
  return best;
}

constexpr int kUnset = -1;
std::atomic<int> g_isa{kUnset};

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

bool is_supported(Isa isa) {
  for (Isa compiled : kCompiledIsas) {
    if (compiled == isa) return cpu_supports(isa);
  }
  return false;
}

Isa current_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    const int chosen = static_cast<int>(automatic_isa());
    // A set_isa() of another thread that came in between wins.
    if (g_isa.compare_exchange_strong(isa, chosen)) isa = chosen;
  }
  return static_cast<Isa>(isa);
}

const char* isa_name() {
  return name(current_isa());
}

void set_isa(const char* isa) {
  const bool automatic = isa == nullptr || *isa == '\0';
  g_isa = static_cast<int>(automatic ? automatic_isa() : parse(isa, "isa"));
}

}  // namespace kd
