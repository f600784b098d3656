// Which CPU instruction set runs: picked once from the CPU, or forced by KDK_CPU_ISA or set_isa().
//
// A family declares the entry of its per-ISA source in every ISA namespace and picks at each call:
//
//   // <family>_cpu.h                                   // <family>.cpp
//   struct Table { void (*forward)(const Args&); };     const Table* t = KD_PICK_ISA(table)();
//   KD_DECLARE_PER_ISA(const Table* table())
//
// Sources compiled per ISA may include this header: it needs nothing but <cstdint>.
#pragma once

#include <cstdint>

namespace kd {

enum class Isa : uint8_t { kBaseline, kAvx2, kAvx512 };

// The ISAs that cmake/Isa.cmake compiles on this architecture, slowest first.
#if defined(__x86_64__)
constexpr Isa kCompiledIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};
#define KD_DECLARE_PER_ISA(...) \
  namespace baseline {          \
  __VA_ARGS__;                  \
  }                             \
  namespace avx2 {              \
  __VA_ARGS__;                  \
  }                             \
  namespace avx512 {            \
  __VA_ARGS__;                  \
  }
#define KD_PICK_ISA(function) \
  (::kd::pick(&::kd::avx512::function, &::kd::avx2::function, &::kd::baseline::function))
#else
constexpr Isa kCompiledIsas[] = {Isa::kBaseline};
#define KD_DECLARE_PER_ISA(...) \
  namespace baseline {          \
  __VA_ARGS__;                  \
  }
#define KD_PICK_ISA(function) (&::kd::baseline::function)
#endif

// "avx512", "avx2" or "baseline": also the names that KDK_CPU_ISA and set_isa() take.
const char* name(Isa isa);

// Compiled in, and this CPU and operating system can run it.
bool is_supported(Isa isa);

// The ISA the next pick() takes. The first call reads KDK_CPU_ISA and throws std::invalid_argument
// if it names no ISA or one that this machine cannot run; so does every later call.
Isa current_isa();
const char* isa_name();

// Forces an ISA from the next pick() on, for all threads; nullptr or "" goes back to the automatic
// choice. Throws std::invalid_argument and changes nothing for a name it cannot serve.
void set_isa(const char* isa);

template <class Function>
Function* pick(Function* avx512, Function* avx2, Function* baseline) {
  switch (current_isa()) {
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    case Isa::kBaseline:
      break;
  }
  return baseline;
}

}  // namespace kd
