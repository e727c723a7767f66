// Chooses the instruction set when a call comes in.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/problem.h"

namespace attncap {

void attention_avx512bf16(const Problem& problem);
void attention_avx512(const Problem& problem);
void attention_avx2(const Problem& problem);
void attention_portable(const Problem& problem);

namespace {

struct InstructionSet {
    const char* name;
    void (*run)(const Problem&);
    bool here;
};

const std::vector<InstructionSet>& known_sets() {
#if defined(__x86_64__)
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const std::vector<InstructionSet> sets = {{"avx512bf16", attention_avx512bf16, avx512bf16},
                                                     {"avx512", attention_avx512, avx512},
                                                     {"avx2", attention_avx2, avx2},
                                                     {"portable", attention_portable, true}};
#else
    static const std::vector<InstructionSet> sets = {{"portable", attention_portable, true}};
#endif
    return sets;
}

}  // namespace

std::vector<const char*> instruction_sets() {
    std::vector<const char*> names;
    for (const InstructionSet& set : known_sets()) {
        if (set.here) names.push_back(set.name);
    }
    return names;
}

void attention(const Problem& problem, const char* isa) {
    for (const InstructionSet& set : known_sets()) {
        if (!set.here || (isa && *isa && std::strcmp(isa, set.name) != 0)) continue;
        return set.run(problem);
    }
    std::string names;
    for (const char* name : instruction_sets()) names += (names.empty() ? "" : ", ") + std::string(name);
    throw std::invalid_argument("ATTNCAP_CPU_ISA: expected one of " + names + ", got '" + isa + "'");
}

}  // namespace attncap
