// Chooses the instruction set when a call comes in.
#include "cpu/dispatch.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/matrix_permission.h"
#include "cpu/row_sums.h"

namespace attncap {

// Weak, thus null, where the compiler knows too little to have made the set.
#define ATTNCAP_DECLARE_ENTRIES(isa)                                                      \
    [[gnu::weak]] void attention_##isa(const Problem& problem);                           \
    [[gnu::weak]] void backward_##isa(const Problem&, const Upstream&, const Gradients&); \
    [[gnu::weak]] double fma_rate_##isa(double seconds);                                  \
    [[gnu::weak]] RowSummary summarise_rows_##isa(const RowValues&, int64_t, int64_t, int64_t, int64_t*, RowScratch&);
ATTNCAP_DECLARE_ENTRIES(amx)
ATTNCAP_DECLARE_ENTRIES(avx512bf16)
ATTNCAP_DECLARE_ENTRIES(avx512)
ATTNCAP_DECLARE_ENTRIES(avx2)
ATTNCAP_DECLARE_ENTRIES(portable)

namespace {

struct InstructionSet {
    const char* name;
    void (*run)(const Problem&);
    void (*run_backward)(const Problem&, const Upstream&, const Gradients&);
    double (*rate)(double);
    SummariseRows summarise_rows;
    bool here, slow_in_bfloat16 = false;
};

#define ATTNCAP_SET(isa, ...) \
    InstructionSet { #isa, attention_##isa, backward_##isa, fma_rate_##isa, summarise_rows_##isa, __VA_ARGS__ }

// Widest first.
const std::vector<InstructionSet>& known_sets() {
#if defined(__x86_64__)
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    // Intel's vector units multiply pairs of bfloat16 at half the rate of floats, AMD's at twice; measured on Emerald
    // Rapids, where calls took 1.6 times as long as those that convert to float.
    static const bool slow_pairs = __builtin_cpu_is("intel");
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool amx = avx512bf16 && may_use_matrix_registers();
    static const std::vector<InstructionSet> sets = {
        ATTNCAP_SET(amx, amx), ATTNCAP_SET(avx512bf16, avx512bf16, slow_pairs), ATTNCAP_SET(avx512, avx512),
        ATTNCAP_SET(avx2, avx2), ATTNCAP_SET(portable, true)};
#else
    static const std::vector<InstructionSet> sets = {ATTNCAP_SET(portable, true)};
#endif
    return sets;
}

// The set named by `isa`, or the widest one here that is not slow in `dtype`.
const InstructionSet& chosen_set(const char* isa, DType dtype = DType::float32) {
    const bool named = isa && *isa;
    for (const InstructionSet& set : known_sets()) {
        const bool suits =
            named ? std::strcmp(isa, set.name) == 0 : !(set.slow_in_bfloat16 && dtype == DType::bfloat16);
        if (set.run && set.here && suits) return set;
    }
    std::string names;
    for (const char* name : instruction_sets()) names += (names.empty() ? "" : ", ") + std::string(name);
    throw std::invalid_argument("ATTNCAP_CPU_ISA: expected one of " + names + ", got '" + isa + "'");
}

}  // namespace

std::vector<const char*> instruction_sets() {
    std::vector<const char*> names;
    for (const InstructionSet& set : known_sets()) {
        if (set.run && set.here) names.push_back(set.name);
    }
    return names;
}

void attention(const Problem& problem, const char* isa) { chosen_set(isa, problem.query.dtype).run(problem); }

void backward(const Problem& problem, const Upstream& upstream, const Gradients& gradients, const char* isa) {
    chosen_set(isa, problem.query.dtype).run_backward(problem, upstream, gradients);
}

SummariseRows summarise_rows_of(const char* isa) { return chosen_set(isa).summarise_rows; }

double fma_rate(double seconds, const char* isa) { return chosen_set(isa).rate(seconds); }

}  // namespace attncap
