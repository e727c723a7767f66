// The CPU kernels in Python.
#include <pybind11/stl.h>

#include <cstdlib>

#include "bindings/bindings.h"
#include "cpu/dispatch.h"
#include "cpu/row_sums.h"

namespace py = pybind11;

namespace attncap {
namespace {

// Read while the interpreter's lock is held, for Python may change the environment.
std::string wanted_isa() {
    const char* isa = std::getenv("ATTNCAP_CPU_ISA");
    return isa ? isa : "";
}

}  // namespace

void bind_cpu(py::module_& m) {
    m.def(
        "attention",
        [](const Problem& problem) {
            const std::string isa = wanted_isa();
            py::gil_scoped_release release;
            attention(problem, isa.c_str());
        },
        py::arg("problem"), "Runs one call on the CPU.");
    m.def(
        "backward",
        [](const Problem& problem, const Upstream& upstream, const Gradients& gradients) {
            const std::string isa = wanted_isa();
            py::gil_scoped_release release;
            backward(problem, upstream, gradients, isa.c_str());
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
            add_rows(statistics, batch, rows, heads, isa.c_str());
        },
        py::arg("statistics"), py::arg("batch"), py::arg("rows"), py::arg("heads"),
        "Counts rows in the summaries of their heads.");
    m.def(
        "fma_rate", [](double seconds) { return fma_rate(seconds, wanted_isa().c_str()); }, py::arg("seconds"),
        "GFLOP/s of one thread that multiplies and adds in registers alone.");
    m.def("instruction_sets", &instruction_sets, "Instruction sets usable here, widest first.");
}

}  // namespace attncap
