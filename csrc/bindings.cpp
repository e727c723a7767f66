// attncap._C: descriptions of a call, and the call. Nothing here links torch; tensors arrive as pointers and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "cpu/problem.h"
#include "cpu/row_sums.h"

namespace py = pybind11;
using attncap::Array;
using attncap::DType;
using attncap::Gradients;
using attncap::Moments;
using attncap::Problem;
using attncap::RowValues;
using attncap::Sequence;
using attncap::Upstream;

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

// Read while the interpreter's lock is held, for Python may change the environment.
std::string wanted_isa() {
    const char* isa = std::getenv("ATTNCAP_CPU_ISA");
    return isa ? isa : "";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "attncap's compiled kernels; called by attncap.cpu.";
    m.attr("source_hash") = ATTNCAP_SOURCE_HASH;
    py::class_<Array>(m, "Array").def(py::init(&make_array), py::arg("data"), py::arg("dtype"), py::arg("strides"));
    py::class_<Sequence>(m, "Sequence")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(), py::arg("batch"), py::arg("row0"),
             py::arg("rows"), py::arg("key0"), py::arg("keys"), py::arg("offset"));
    py::class_<Problem>(m, "Problem")
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
    py::class_<Upstream>(m, "Upstream")
        .def(py::init<>())
#define ATTNCAP_FIELD(name) .def_readwrite(#name, &Upstream::name)
            ATTNCAP_FIELD(out) ATTNCAP_FIELD(lse) ATTNCAP_FIELD(max_logit) ATTNCAP_FIELD(entropy)
                ATTNCAP_FIELD(collision) ATTNCAP_FIELD(sink_mass) ATTNCAP_FIELD(diagonal_mass) ATTNCAP_FIELD(distance)
                    ATTNCAP_FIELD(null_mass) ATTNCAP_FIELD(offset_mass) ATTNCAP_FIELD(tag_mass)
                        ATTNCAP_FIELD(feature_mass) ATTNCAP_FIELD(topk_prob) ATTNCAP_FIELD(received_mass);
#undef ATTNCAP_FIELD
    py::class_<Gradients>(m, "Gradients")
        .def(py::init<>())
#define ATTNCAP_FIELD(name) .def_readwrite(#name, &Gradients::name)
            ATTNCAP_FIELD(query) ATTNCAP_FIELD(key) ATTNCAP_FIELD(value) ATTNCAP_FIELD(attn_mask)
                ATTNCAP_FIELD(sink_logits) ATTNCAP_FIELD(key_features) ATTNCAP_FIELD(level);
#undef ATTNCAP_FIELD
    m.def(
        "attention",
        [](const Problem& problem) {
            const std::string isa = wanted_isa();
            py::gil_scoped_release release;
            attncap::attention(problem, isa.c_str());
        },
        py::arg("problem"), "Runs one call on the CPU.");
    m.def(
        "backward",
        [](const Problem& problem, const Upstream& upstream, const Gradients& gradients) {
            const std::string isa = wanted_isa();
            py::gil_scoped_release release;
            attncap::backward(problem, upstream, gradients, isa.c_str());
        },
        py::arg("problem"), py::arg("upstream"), py::arg("gradients"), "Runs the backward of one call on the CPU.");
    py::class_<Moments>(m, "Moments")
        .def(py::init([](uintptr_t count, uintptr_t nonfinite, uintptr_t mean, uintptr_t m2, uintptr_t low,
                         uintptr_t high, uintptr_t histogram, int64_t bins) {
                 const auto integers = [](uintptr_t address) { return reinterpret_cast<int64_t*>(address); };
                 const auto floats = [](uintptr_t address) { return reinterpret_cast<double*>(address); };
                 return Moments{integers(count), integers(nonfinite), floats(mean),        floats(m2),
                                floats(low),     floats(high),        integers(histogram), bins};
             }),
             py::arg("count"), py::arg("nonfinite"), py::arg("mean"), py::arg("m2"), py::arg("low"), py::arg("high"),
             py::arg("histogram"), py::arg("bins"));
    py::class_<RowValues>(m, "RowValues")
        .def(py::init([](const Array& values, const Array& counted, const std::vector<Moments>& moments,
                         bool is_signed) { return RowValues{values, counted, moments, is_signed}; }),
             py::arg("values"), py::arg("counted"), py::arg("moments"), py::arg("is_signed"));
    m.def(
        "add_rows",
        [](const std::vector<RowValues>& statistics, int64_t batch, int64_t rows, const std::vector<int64_t>& heads) {
            const std::string isa = wanted_isa();
            py::gil_scoped_release release;
            attncap::add_rows(statistics, batch, rows, heads, isa.c_str());
        },
        py::arg("statistics"), py::arg("batch"), py::arg("rows"), py::arg("heads"),
        "Counts rows in the summaries of their heads.");
    m.def(
        "fma_rate", [](double seconds) { return attncap::fma_rate(seconds, wanted_isa().c_str()); }, py::arg("seconds"),
        "GFLOP/s of one thread that multiplies and adds in registers alone.");
    m.def("instruction_sets", &attncap::instruction_sets, "Instruction sets usable here, widest first.");
}
