// Fibers: one stack per CUDA thread of the block that is being emulated.
//
// A switch saves only what the ABI asks a callee to keep, which costs about 10 ns; ucontext (two
// system calls a switch, about 20 times slower) serves platforms without an assembly version.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define KD_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KD_SIMT_ASAN 1
#endif
#endif
#if !defined(KD_SIMT_ASAN)
#define KD_SIMT_ASAN 0
#endif
#if KD_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// -DKD_SIMT_UCONTEXT=1 forces the portable version, so that it can be tested anywhere.
#if !defined(KD_SIMT_UCONTEXT)
#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__))
#define KD_SIMT_UCONTEXT 0
#else
#define KD_SIMT_UCONTEXT 1
#endif
#endif
#if KD_SIMT_UCONTEXT
#include <ucontext.h>
#endif

#if !KD_SIMT_UCONTEXT
// void kd_simt_switch(void** save, void* load): push the callee-saved registers, store the stack
// pointer in *save, continue on the stack `load`. A COMDAT, so every file may include this header.
#if defined(__x86_64__)
asm(R"(
  .pushsection .text.kd_simt_switch,"axG",@progbits,kd_simt_switch,comdat
  .weak kd_simt_switch
  .hidden kd_simt_switch
  .type kd_simt_switch,@function
kd_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size kd_simt_switch,.-kd_simt_switch
  .popsection
)");
#else
asm(R"(
  .pushsection .text.kd_simt_switch,"axG",%progbits,kd_simt_switch,comdat
  .weak kd_simt_switch
  .hidden kd_simt_switch
  .type kd_simt_switch,%function
kd_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size kd_simt_switch,.-kd_simt_switch
  .popsection
)");
#endif
extern "C" void kd_simt_switch(void** save, void* load);
#endif  // !KD_SIMT_UCONTEXT

namespace simt::host {

#if KD_SIMT_UCONTEXT
struct Context {
  ucontext_t registers;
};
#else
struct Context {
  void* stack_pointer = nullptr;
};
#endif

// A stack with a guard page below it: an overflow is a fault and not a neighbour's wrong value.
class Stack {
 public:
  static constexpr size_t kBytes = KD_SIMT_ASAN ? 256 << 10 : 64 << 10;

  Stack() : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, guard_ + kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_, guard_, PROT_NONE);
  }
  ~Stack() {
    if (!base_) return;
    forget();
    munmap(base_, guard_ + kBytes);
  }
  Stack(Stack&& other) noexcept : base_(other.base_), guard_(other.guard_) {
    other.base_ = nullptr;
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return base_ + guard_; }
  char* top() const { return bottom() + kBytes; }

  // After a fiber was abandoned half-way its frames are still marked as in use.
  void forget() const {
#if KD_SIMT_ASAN
    __asan_unpoison_memory_region(bottom(), kBytes);
#endif
  }

 private:
  char* base_ = nullptr;
  size_t guard_;
};

// Makes the first switch to `context` call `entry` on an empty stack; `entry` never returns.
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
#if KD_SIMT_UCONTEXT
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack.bottom();
  context.registers.uc_stack.ss_size = Stack::kBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#elif defined(__x86_64__)
  // Six registers, the address `ret` jumps to, and a null return address that ends backtraces.
  void** frame = reinterpret_cast<void**>(stack.top()) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = frame;
#else
  void** frame = reinterpret_cast<void**>(stack.top()) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = nullptr;
  frame[11] = reinterpret_cast<void*>(entry);  // x30, the link register
  context.stack_pointer = frame;
#endif
}

inline void switch_context(Context& from, Context& to) {
#if KD_SIMT_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  kd_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

}  // namespace simt::host
