// attncap._C: descriptions of a call, and the call. Nothing here links torch; tensors arrive as pointers and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>

#include "cpu/moments.h"
#include "cpu/problem.h"

namespace py = pybind11;
using attncap::Array;
using attncap::DType;
using attncap::Problem;
using attncap::Sequence;

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

// `bin_grid` is (shift, lowest, highest) of attncap/histogram.py; `bins` 0 for no histogram.
void summarise_rows(const Array& values, const Array& counted, std::array<int64_t, 3> shape,
                    std::array<uintptr_t, 6> outputs, uintptr_t bins, int64_t bin_count,
                    std::array<int64_t, 3> bin_grid, bool bin_signed, int threads) {
    attncap::RowSummary summary;
    summary.sequences = shape[0], summary.heads = shape[1], summary.rows = shape[2];
    summary.values = values, summary.counted = counted;
    summary.count = reinterpret_cast<int64_t*>(outputs[0]);
    summary.nonfinite = reinterpret_cast<int64_t*>(outputs[1]);
    summary.mean = reinterpret_cast<double*>(outputs[2]);
    summary.m2 = reinterpret_cast<double*>(outputs[3]);
    summary.low = reinterpret_cast<double*>(outputs[4]);
    summary.high = reinterpret_cast<double*>(outputs[5]);
    summary.bins = reinterpret_cast<int64_t*>(bins);
    summary.bin_count = bin_count;
    summary.bin_shift = int(bin_grid[0]), summary.bin_lowest = bin_grid[1], summary.bin_highest = bin_grid[2];
    summary.bin_signed = bin_signed;
    summary.threads = std::max(1, threads);
    attncap::summarise_rows(summary);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "attncap's compiled kernels; called by attncap.cpu.";
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
    m.def(
        "attention", [](const Problem& problem) { attncap::attention(problem, std::getenv("ATTNCAP_CPU_ISA")); },
        py::arg("problem"), py::call_guard<py::gil_scoped_release>(), "Runs one call on the CPU.");
    m.def("summarise_rows", &summarise_rows, py::arg("values"), py::arg("counted"), py::arg("shape"),
          py::arg("outputs"), py::arg("bins"), py::arg("bin_count"), py::arg("bin_grid"), py::arg("bin_signed"),
          py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
          "Summaries of (B,H,N) rows; outputs are pointers to count, nonfinite, mean, m2, low, high of (B,H).");
    m.def("instruction_sets", &attncap::instruction_sets, "Instruction sets usable here, widest first.");
}
