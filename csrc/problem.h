// One attention call as the kernels see it: raw pointers, strides in elements, plain numbers.
// The meaning of every field is that of attncap/reference.py; Python has checked shapes and types.
#pragma once

#include <cstdint>
#include <vector>

namespace attncap {

enum class DType : int32_t { float32, float64, bfloat16, float16, boolean, int32 };

inline int64_t item_size(DType dtype) {
    switch (dtype) {
        case DType::float64:
            return 8;
        case DType::float32:
        case DType::int32:
            return 4;
        case DType::bfloat16:
        case DType::float16:
            return 2;
        case DType::boolean:
            return 1;
    }
    return 0;
}

// A strided tensor of up to four dimensions; absent when data is null.
struct Array {
    char* data = nullptr;
    DType dtype = DType::float32;
    int64_t stride[4] = {0, 0, 0, 0};

    bool given() const { return data != nullptr; }
    char* at(int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) const {
        return data + item_size(dtype) * (a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]);
    }
};

// Rows row0 .. row0 + rows - 1 of batch entry `batch` attend to keys key0 .. key0 + keys - 1;
// row i stands at position i + offset of its own sequence.
struct Sequence {
    int64_t batch, row0, rows, key0, keys, offset;
};

struct Problem {
    int64_t heads = 0, key_heads = 0, key_dim = 0, value_dim = 0;
    std::vector<Sequence> sequences;
    int threads = 1;

    double scale = 1.0;
    double softcap = 0.0;  // 0 = none
    bool causal = false;
    int64_t window_left = -1, window_right = -1;  // -1 = unlimited

    bool entropy = false, max = false, distance = false, collision = false, received = false;
    int64_t sink = 0;
    int64_t diagonal = -1;  // -1 = off
    int64_t topk = 0;
    std::vector<int64_t> offsets;
    int64_t tags = 0, features = 0;

    // Inputs: query (B,H,Q,D), key and value (B,G,K,.), attn_mask (B,H,Q,K), sink_logits (H), query_mask (B,Q),
    // query_tags (T,B,Q), key_tags (T,B,K), key_features (B,K,F).
    Array query, key, value, attn_mask, sink_logits, query_mask, query_tags, key_tags, key_features;

    // Outputs: out (B,H,Q,E); per row (B,H,Q) or (B,H,Q,n); received_mass (B,H,K), zero on entry.
    Array out, lse, max_logit, entropy_out, collision_out, sink_mass, diagonal_mass, distance_out, null_mass;
    Array offset_mass, tag_mass, feature_mass, topk_prob, topk_index, received_mass;
};

// A loss's derivative by each output of a call, absent where it does not depend on it; shaped as the outputs are.
struct Upstream {
    Array out, lse, max_logit, entropy, collision, sink_mass, diagonal_mass, distance, null_mass, offset_mass, tag_mass,
        feature_mass, topk_prob, received_mass;
};

// Where the gradients of a call's inputs go, absent where not wanted. They are zero on entry, in the type that is
// computed in, and have unit stride along the last dimension but for the mask's, whose strides are 0 where it is
// broadcast. `level` (B, H, Q) is no gradient but what a backward finds on its way to them, see levels.h.
struct Gradients {
    Array query, key, value, attn_mask, sink_logits, key_features, level;
};

}  // namespace attncap
