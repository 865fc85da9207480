// Fibers for the CUDA emulator: a stack each, and a switch between two of them that is a dozen instructions (swapcontext makes a system
// call).
#pragma once
#include <sys/mman.h>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

using Entry = void (*)();

#if defined(__x86_64__)
// Pushes the registers that a call must preserve, stores the stack pointer in *from, takes `to` and pops. Weak: every file that includes
// this header brings a copy. MXCSR and the x87 control word are the same everywhere and stay as they are.
asm(R"(
  .text
  .weak fa_emu_switch
  .hidden fa_emu_switch
  .type fa_emu_switch, @function
fa_emu_switch:
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
  .size fa_emu_switch, .-fa_emu_switch
)");
extern "C" __attribute__((visibility("hidden"))) void fa_emu_switch(void** from, void* to);

struct Context {
  void* stack_pointer = nullptr;
  // The first switch to it "returns" into entry, with the stack aligned as after a call.
  void prepare(char* stack, size_t size, Entry entry) {
    void** top = reinterpret_cast<void**>(stack + size);
    *--top = nullptr;  // the return address of entry, which never returns
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
};
inline void switch_context(Context& from, Context& to) { fa_emu_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, size_t size, Entry entry) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// Stacks are mapped once and handed out again; an unmapped page under each turns an overflow into a crash.
class StackPool {
 public:
  static constexpr size_t kSize = 64 << 10, kGuard = 4096;
  char* take() {
    if (free_.empty()) {
      char* p =
          static_cast<char*>(mmap(nullptr, kSize + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (p == MAP_FAILED) throw std::bad_alloc();
      mprotect(p, kGuard, PROT_NONE);
      return p + kGuard;
    }
    char* p = free_.back();
    free_.pop_back();
    return p;
  }
  void give(char* stack) { free_.push_back(stack); }

 private:
  std::vector<char*> free_;
};

}  // namespace emu
