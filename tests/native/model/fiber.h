// Functions that run on stacks of their own and hand over to each other where they choose to.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace attncap {
namespace device {
namespace model {

// A stack above a page that stops the program when it overflows. Pages that are never used cost nothing.
class Stack {
  public:
    static constexpr size_t kBytes = size_t(1) << 18;

    explicit Stack(size_t number) : guard_(size_t(sysconf(_SC_PAGESIZE))), unused_(number * kOffset % kOffsets) {
        void* memory = mmap(nullptr, guard_ + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        memory_ = static_cast<char*>(memory);
        mprotect(memory_, guard_, PROT_NONE);
    }
    ~Stack() { munmap(memory_, guard_ + kBytes); }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    char* bottom() const { return memory_ + guard_; }
    // Stacks start at different offsets: the same one would put the tops of all into a few lines of the caches.
    char* top() const { return bottom() + kBytes - unused_; }

  private:
    static constexpr size_t kOffset = 1600, kOffsets = size_t(1) << 16;
    const size_t guard_, unused_;
    char* memory_;
};

#if defined(__x86_64__)
#if defined(__clang__)
#define ATTNCAP_NAKED __attribute__((naked, noinline))
#else
#define ATTNCAP_NAKED __attribute__((naked, noipa))
#endif

// Leaves a stack, whose pointer it stores, for another that was left in the same way. A system call per switch, as
// swapcontext has it for the signal mask, would take most of a run's time.
ATTNCAP_NAKED inline void switch_stack(void** /* left */, void* /* entered */) {
    asm("pushq %rbp\n\t"
        "pushq %rbx\n\t"
        "pushq %r12\n\t"
        "pushq %r13\n\t"
        "pushq %r14\n\t"
        "pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\t"
        "popq %r14\n\t"
        "popq %r13\n\t"
        "popq %r12\n\t"
        "popq %rbx\n\t"
        "popq %rbp\n\t"
        "ret");
}
#undef ATTNCAP_NAKED
#endif

// Where a stack was left; a default one takes the stack of whoever switches away from it.
class Context {
  public:
    // `entry` starts on the stack when it is first switched to, and must never return.
    void prepare(const Stack& stack, void (*entry)()) {
        bottom_ = stack.bottom();
        bytes_ = Stack::kBytes;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(bottom_, bytes_);
#endif
#if defined(__x86_64__)
        // As after a call: the return address `entry` takes leaves the stack pointer 8 past a multiple of 16.
        void** top = reinterpret_cast<void**>(stack.top());
        top[-1] = nullptr;
        top[-2] = reinterpret_cast<void*>(entry);
        constexpr int kSavedRegisters = 6;
        for (int i = 0; i < kSavedRegisters; ++i) top[-3 - i] = nullptr;
        pointer_ = top - 2 - kSavedRegisters;
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack.bottom();
        context_.uc_stack.ss_size = Stack::kBytes;
        makecontext(&context_, entry, 0);
#endif
    }

    // A stack that is left for good is not entered again.
    void switch_to(Context* other, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, other->bottom_, other->bytes_);
#endif
#if defined(__x86_64__)
        switch_stack(&pointer_, other->pointer_);
#else
        swapcontext(&context_, &other->context_);
#endif
        entered(other);
    }

    // What a stack does first when it is entered, also when it starts.
    void entered([[maybe_unused]] Context* from) {
#if defined(__SANITIZE_ADDRESS__)
        const void* bottom;
        size_t bytes;
        __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
        if (!from->bottom_) {
            from->bottom_ = static_cast<char*>(const_cast<void*>(bottom));
            from->bytes_ = bytes;
        }
#endif
    }

  private:
    char* bottom_ = nullptr;
    size_t bytes_ = 0;
#if defined(__x86_64__)
    void* pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack_ = nullptr;
#endif
};

}  // namespace model
}  // namespace device
}  // namespace attncap
