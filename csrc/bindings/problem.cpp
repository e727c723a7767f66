// A call's description in Python. Its classes belong to the module that binds them, so that several modules can.
#include "problem.h"

#include <pybind11/stl.h>

#include <utility>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace attncap {
namespace {

Array make_array(uintptr_t data, const std::string& dtype, const std::vector<int64_t>& strides) {
    static const std::pair<const char*, DType> names[] = {{"float32", DType::float32},   {"float64", DType::float64},
                                                          {"bfloat16", DType::bfloat16}, {"float16", DType::float16},
                                                          {"bool", DType::boolean},      {"int32", DType::int32}};
    if (strides.size() > 4) throw std::invalid_argument("strides: expected at most 4");
    Array array;
    array.data = reinterpret_cast<char*>(data);
    std::copy(strides.begin(), strides.end(), array.stride);
    for (const auto& [name, value] : names) {
        if (dtype == name) {
            array.dtype = value;
            return array;
        }
    }
    throw std::invalid_argument("dtype: expected one that the kernels read, got " + dtype);
}

}  // namespace

void bind_problem(py::module_& m) {
    py::class_<Array>(m, "Array", py::module_local())
        .def(py::init(&make_array), py::arg("data"), py::arg("dtype"), py::arg("strides"));
    py::class_<Sequence>(m, "Sequence", py::module_local())
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(), py::arg("batch"), py::arg("row0"),
             py::arg("rows"), py::arg("key0"), py::arg("keys"), py::arg("offset"));
    py::class_<Problem>(m, "Problem", py::module_local())
        .def(py::init<>())
#define ATTNCAP_FIELD(name) .def_readwrite(#name, &Problem::name)
            ATTNCAP_FIELD(heads) ATTNCAP_FIELD(key_heads) ATTNCAP_FIELD(key_dim) ATTNCAP_FIELD(value_dim)
                ATTNCAP_FIELD(sequences) ATTNCAP_FIELD(threads) ATTNCAP_FIELD(scale) ATTNCAP_FIELD(softcap)
                    ATTNCAP_FIELD(causal) ATTNCAP_FIELD(window_left) ATTNCAP_FIELD(window_right) ATTNCAP_FIELD(entropy)
                        ATTNCAP_FIELD(max) ATTNCAP_FIELD(distance) ATTNCAP_FIELD(collision) ATTNCAP_FIELD(received)
                            ATTNCAP_FIELD(sink) ATTNCAP_FIELD(diagonal) ATTNCAP_FIELD(topk) ATTNCAP_FIELD(offsets)
                                ATTNCAP_FIELD(tags) ATTNCAP_FIELD(features) ATTNCAP_FIELD(query) ATTNCAP_FIELD(key)
                                    ATTNCAP_FIELD(value) ATTNCAP_FIELD(attn_mask) ATTNCAP_FIELD(sink_logits)
                                        ATTNCAP_FIELD(query_mask) ATTNCAP_FIELD(query_tags) ATTNCAP_FIELD(key_tags)
                                            ATTNCAP_FIELD(key_features) ATTNCAP_FIELD(out) ATTNCAP_FIELD(lse)
                                                ATTNCAP_FIELD(max_logit) ATTNCAP_FIELD(entropy_out)
                                                    ATTNCAP_FIELD(collision_out) ATTNCAP_FIELD(sink_mass)
                                                        ATTNCAP_FIELD(diagonal_mass) ATTNCAP_FIELD(distance_out)
                                                            ATTNCAP_FIELD(null_mass) ATTNCAP_FIELD(offset_mass)
                                                                ATTNCAP_FIELD(tag_mass) ATTNCAP_FIELD(feature_mass)
                                                                    ATTNCAP_FIELD(topk_prob) ATTNCAP_FIELD(topk_index)
                                                                        ATTNCAP_FIELD(received_mass);
#undef ATTNCAP_FIELD
    py::class_<Upstream>(m, "Upstream", py::module_local())
        .def(py::init<>())
#define ATTNCAP_FIELD(name) .def_readwrite(#name, &Upstream::name)
            ATTNCAP_FIELD(out) ATTNCAP_FIELD(lse) ATTNCAP_FIELD(max_logit) ATTNCAP_FIELD(entropy)
                ATTNCAP_FIELD(collision) ATTNCAP_FIELD(sink_mass) ATTNCAP_FIELD(diagonal_mass) ATTNCAP_FIELD(distance)
                    ATTNCAP_FIELD(null_mass) ATTNCAP_FIELD(offset_mass) ATTNCAP_FIELD(tag_mass)
                        ATTNCAP_FIELD(feature_mass) ATTNCAP_FIELD(topk_prob) ATTNCAP_FIELD(received_mass);
#undef ATTNCAP_FIELD
    py::class_<Gradients>(m, "Gradients", py::module_local())
        .def(py::init<>())
#define ATTNCAP_FIELD(name) .def_readwrite(#name, &Gradients::name)
            ATTNCAP_FIELD(query) ATTNCAP_FIELD(key) ATTNCAP_FIELD(value) ATTNCAP_FIELD(attn_mask)
                ATTNCAP_FIELD(sink_logits) ATTNCAP_FIELD(key_features) ATTNCAP_FIELD(level);
#undef ATTNCAP_FIELD
}

}  // namespace attncap
