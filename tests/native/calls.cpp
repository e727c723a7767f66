// Calls of every kind and their backwards on several threads, two of them at once, on each instruction set of this
// machine: what the thread sanitizer watches in `make sanitize`, with neither Python nor torch in the process. Fails,
// too, where a call on several threads gives other bits than on one.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <list>
#include <random>
#include <string>
#include <thread>

#include "cpu/dispatch.h"

using attncap::Array;
using attncap::DType;
using attncap::Gradients;
using attncap::Problem;
using attncap::Sequence;
using attncap::Upstream;

namespace {

constexpr int64_t kDim = 8, kTags = 2, kFeatures = 3, kTopK = 8;

// A call, with the memory that its tensors lie in.
struct Call {
    std::string name;
    Problem problem;
    Upstream upstream;
    Gradients gradients;
    std::list<std::vector<char>> inputs, outputs;
    std::mt19937 random{1};

    // A contiguous tensor; four sizes whatever the meaning.
    Array tensor(std::list<std::vector<char>>* memory, DType dtype, std::vector<int64_t> sizes) {
        Array array;
        array.dtype = dtype;
        int64_t count = 1;
        for (int i = int(sizes.size()) - 1; i >= 0; --i) array.stride[i] = count, count *= sizes[i];
        array.data = memory->emplace_back(count * item_size(dtype)).data();
        return array;
    }

    Array numbers(DType dtype, std::vector<int64_t> sizes) {
        std::normal_distribution<double> normal;
        const Array array = tensor(&inputs, dtype, std::move(sizes));
        std::vector<char>& bytes = inputs.back();
        for (size_t at = 0; at < bytes.size(); at += item_size(dtype)) {
            const double x = normal(random);
            const float rounded = float(x);
            uint32_t bits;
            std::memcpy(&bits, &rounded, 4);
            const uint16_t bfloat = uint16_t(bits >> 16);
            const int32_t whole = int32_t(2 * x);
            const uint8_t flag = x > -1;
            if (dtype == DType::float64) std::memcpy(&bytes[at], &x, 8);
            if (dtype == DType::float32) std::memcpy(&bytes[at], &rounded, 4);
            if (dtype == DType::bfloat16) std::memcpy(&bytes[at], &bfloat, 2);
            if (dtype == DType::int32) std::memcpy(&bytes[at], &whole, 4);
            if (dtype == DType::boolean) std::memcpy(&bytes[at], &flag, 1);
        }
        return array;
    }

    // A call with every statistic; `rows` and `keys` are those of all sequences together.
    Call(std::string its_name, DType dtype, int64_t heads, int64_t key_heads, int64_t rows, int64_t keys)
        : name(std::move(its_name)) {
        Problem& p = problem;
        p.heads = heads, p.key_heads = key_heads, p.key_dim = p.value_dim = kDim;
        p.sequences = {{0, 0, rows, 0, keys, keys - rows}};
        p.scale = 0.35;
        p.entropy = p.max = p.distance = p.collision = p.received = true;
        p.sink = 4, p.diagonal = 1, p.topk = kTopK, p.offsets = {-1, 0};
        p.tags = kTags, p.features = kFeatures;
        p.query = numbers(dtype, {1, heads, rows, kDim});
        p.key = numbers(dtype, {1, key_heads, keys, kDim});
        p.value = numbers(dtype, {1, key_heads, keys, kDim});
        p.sink_logits = numbers(DType::float32, {heads});
        p.query_mask = numbers(DType::boolean, {1, rows});
        p.query_tags = numbers(DType::int32, {kTags, 1, rows});
        p.key_tags = numbers(DType::int32, {kTags, 1, keys});
        p.key_features = numbers(DType::float32, {1, keys, kFeatures});

        const DType number = dtype == DType::float64 ? DType::float64 : DType::float32;
        auto per_row = [&](DType type, int64_t n) { return tensor(&outputs, type, {1, heads, rows, n}); };
        p.out = per_row(dtype, kDim);
        for (Array* each : {&p.lse, &p.max_logit, &p.entropy_out, &p.collision_out, &p.sink_mass, &p.diagonal_mass,
                            &p.distance_out, &p.null_mass}) {
            *each = per_row(number, 1);
        }
        p.offset_mass = per_row(number, 2), p.tag_mass = per_row(number, kTags);
        p.feature_mass = per_row(number, kFeatures);
        p.topk_prob = per_row(number, kTopK), p.topk_index = per_row(DType::int32, kTopK);
        p.received_mass = tensor(&outputs, number, {1, heads, keys});
        add_backward(dtype, number, rows, keys);
    }

    void add_backward(DType dtype, DType number, int64_t rows, int64_t keys) {
        const int64_t heads = problem.heads, key_heads = problem.key_heads;
        upstream.out = numbers(dtype, {1, heads, rows, kDim});
        auto per_row = [&](int64_t n) { return numbers(number, {1, heads, rows, n}); };
        for (Array* each : {&upstream.lse, &upstream.max_logit, &upstream.entropy, &upstream.collision,
                            &upstream.sink_mass, &upstream.diagonal_mass, &upstream.distance, &upstream.null_mass}) {
            *each = per_row(1);
        }
        upstream.offset_mass = per_row(2), upstream.tag_mass = per_row(kTags);
        upstream.feature_mass = per_row(kFeatures), upstream.topk_prob = per_row(kTopK);
        upstream.received_mass = numbers(number, {1, heads, keys});
        gradients.query = tensor(&outputs, number, {1, heads, rows, kDim});
        gradients.key = tensor(&outputs, number, {1, key_heads, keys, kDim});
        gradients.value = tensor(&outputs, number, {1, key_heads, keys, kDim});
        gradients.sink_logits = tensor(&outputs, number, {heads});
        gradients.key_features = tensor(&outputs, number, {1, keys, kFeatures});
    }

    std::list<std::vector<char>> run(const char* isa, int threads) {
        for (auto& output : outputs) std::fill(output.begin(), output.end(), char(0));
        problem.threads = threads;
        attncap::attention(problem, isa);
        attncap::backward(problem, upstream, gradients, isa);
        return outputs;
    }
};

std::list<Call> calls_of_every_kind() {
    std::list<Call> calls;
    calls.emplace_back("causal, grouped heads", DType::float32, 4, 2, 1100, 1300).problem.causal = true;
    calls.emplace_back("bfloat16", DType::bfloat16, 2, 1, 200, 1160);
    calls.emplace_back("float64, window", DType::float64, 2, 2, 150, 700).problem.window_left = 90;
    calls.emplace_back("decoding, heads that share keys", DType::float32, 8, 1, 1, 2400);
    Call& masked = calls.emplace_back("mask, softcap, no received mass", DType::float32, 2, 2, 300, 300);
    masked.problem.attn_mask = masked.numbers(DType::float32, {1, 1, 300, 300});
    masked.gradients.attn_mask = masked.tensor(&masked.outputs, DType::float32, {1, 1, 300, 300});
    masked.problem.attn_mask.stride[1] = masked.gradients.attn_mask.stride[1] = 0;
    masked.problem.softcap = 5, masked.problem.received = false;
    masked.problem.received_mass = masked.upstream.received_mass = Array();
    Call& packed = calls.emplace_back("packed sequences", DType::float32, 4, 1, 400, 500);
    packed.problem.sequences = {
        {0, 0, 1, 0, 150, 149}, {0, 1, 0, 150, 50, 50}, {0, 1, 3, 200, 0, -3}, {0, 4, 396, 200, 300, 0}};
    return calls;
}

// Runs the calls on 1, 2 and 5 threads; false where bits differ.
bool same_on_any_number_of_threads(const char* isa) {
    bool right = true;
    for (Call& call : calls_of_every_kind()) {
        const auto alone = call.run(isa, 1);
        for (int threads : {2, 5}) {
            if (call.run(isa, threads) == alone) continue;
            std::printf("%s: %s on %d threads gives other bits than on one\n", isa, call.name.c_str(), threads);
            right = false;
        }
    }
    return right;
}

// What the sanitizer must report, or its silence means nothing.
int race() {
    int count = 0;
#pragma omp parallel num_threads(4)
    ++count;
    return count;
}

}  // namespace

int main(int arguments, char** argument) {
    if (arguments > 1 && std::strcmp(argument[1], "race") == 0) return race() == 0;
    int wrong = 0;
    for (const char* isa : attncap::instruction_sets()) {
        bool other_right = true;  // two callers at once, each with threads of its own
        std::thread other([&] { other_right = same_on_any_number_of_threads(isa); });
        wrong += !same_on_any_number_of_threads(isa);
        other.join();
        wrong += !other_right;
        std::printf("%s done\n", isa);
    }
    return wrong == 0 ? 0 : 1;
}
