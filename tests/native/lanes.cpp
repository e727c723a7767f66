// Checks the layer over one instruction set, which ATTNCAP_ISA and the macros of the kernels' sources name; prints a
// line for each group of checks, which tests/test_lanes.py reads.
#include "elementary.h"
#include "lists.h"
#include "matrix.h"
#include "pairs.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
void check_type(const std::string& type) {
    check::group(type + ".memory", check_memory<T>);
    check::group(type + ".arithmetic", check_arithmetic<T>);
    check::group(type + ".compare", check_compare<T>);
    check::group(type + ".masks", check_masks<T>);
    check::group(type + ".places", check_places<T>);
    check::group(type + ".transpose", check_transpose<T>);
    check::group(type + ".sum_each", check_sum_each<T>);
    check::group(type + ".exp", check_exp<T>);
    check::group(type + ".tanh", check_tanh<T>);
    check::group(type + ".log", check_log<T>);
    check::group(type + ".next_above", check_next_above<T>);
    check::group(type + ".topk", [] { check_topk<T>(false); });
    check::group(type + ".topk_lines", [] { check_topk<T>(true); });
    check::group(type + ".turned", check_turned_in_and_out<T>);
    check::group(type + ".scores", [] { check_score_tiles<Plain<T>>(1); });
    check::group(type + ".maxima", check_tile_maxima<T>);
    check::group(type + ".values", check_value_tiles<T>);
    check::group(type + ".sums", [] { check_sums<Plain<T>>(1); });
    check::group(type + ".received", check_columns<T>);
    check::group(type + ".strided", check_strided<T>);
    check::group(type + ".narrow", [] { check_narrow_products<T, StoredOwn<T>>(kOwn<T>); });
}

inline void check_all() {
    check_type<float>("float");
    check_type<double>("double");
    check::group("half", [] { check_narrow(kHalf, half_to_float, float_to_half); });
    check::group("bfloat", [] { check_narrow(kBfloat, bfloat_to_float, float_to_bfloat); });
    check::group("stored", check_lanes_of_stored);
    check::group("half.narrow", [] { check_narrow_products<float, StoredHalf>(DType::float16); });
    check::group("bfloat.narrow", [] { check_narrow_products<float, StoredBfloat>(DType::bfloat16); });
#if defined(ATTNCAP_BF16)
    check::group("pairs", check_pairs);
    check::group("pairs.scores", [] { check_score_tiles<Pairs<float>>(2); });
    check::group("pairs.sums", [] { check_sums<Pairs<float>>(2); });
#endif
#if defined(ATTNCAP_AMX)
    check::group("matrix.products", check_matrix_products);
    check::group("matrix.denormals", check_matrix_denormals);
#endif
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap

int main() { attncap::ATTNCAP_ISA::check_all(); }
