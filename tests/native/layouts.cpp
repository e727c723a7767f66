// Descriptors, the swizzle and the places of fragments in registers, against what CuTe says of the same tiles.
// Host code: shared memory starts at 0.
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "check.h"
#include "cuda/descriptor.h"
#include "model/copies.h"
#include "model/fragments.h"

namespace {

using namespace cute;
using namespace attncap::device;
using Number = cute::bfloat16_t;

constexpr int kDepth = 16;

template <class Tensor>
int64_t byte_of_step(const Tensor& tensor, int k) {
    return (raw_pointer_cast(tensor(_, _, 0, k).data()) - raw_pointer_cast(tensor.data())) * int64_t(sizeof(Number));
}

// [ROWS][COLUMNS] of panels, K along the columns.
template <int ROWS, int COLUMNS>
void check_k_major() {
    alignas(1024) static Number memory[ROWS * COLUMNS];
    const auto layout = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Number>{}, Shape<Int<ROWS>, Int<COLUMNS>>{});
    const auto steps = flat_divide(make_tensor(make_smem_ptr(memory), layout), Shape<Int<ROWS>, Int<kDepth>>{});
    for (int k = 0; k < COLUMNS / kDepth; ++k) {
        const uint64_t theirs = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(steps(_, _, 0, k));
        check::that(theirs == k_major_bits(0), "bits", {double(theirs), double(k_major_bits(0))});
        const int panel = k * kDepth / kPanelColumns, within = k * kDepth % kPanelColumns;
        check::that(byte_of_step(steps, k) == panel * ROWS * kRowBytes + within * 2, "the next 16 of K", {double(k)});
    }
}

// [ROWS][COLUMNS] of panels, K along the rows.
template <int ROWS, int COLUMNS>
void check_mn_major() {
    alignas(1024) static Number memory[ROWS * COLUMNS];
    const auto layout =
        tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<Number>{}, Shape<Int<COLUMNS>, Int<ROWS>>{}, Step<_2, _1>{});
    const auto steps = flat_divide(make_tensor(make_smem_ptr(memory), layout), Shape<Int<COLUMNS>, Int<kDepth>>{});
    for (int k = 0; k < ROWS / kDepth; ++k) {
        const uint64_t theirs = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(steps(_, _, 0, k));
        // With one panel there is no next one to lead to.
        const int leading = COLUMNS > kPanelColumns ? ROWS * kRowBytes : int(theirs >> 16 & 0x3fff) * 16;
        check::that(theirs == mn_major_bits(0, leading), "bits", {double(theirs), double(mn_major_bits(0, leading))});
        check::that(byte_of_step(steps, k) == k * kDepth * kRowBytes, "the next 16 of K", {double(k)});
    }
}

// Where an element of panels [ROWS][64] lies.
template <int ROWS, int COLUMNS>
void check_swizzle() {
    const auto layout = as_position_independent_swizzle_layout(
        tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Number>{}, Shape<Int<ROWS>, Int<COLUMNS>>{}));
    for (int row = 0; row < ROWS; ++row) {
        for (int column = 0; column < COLUMNS; ++column) {
            const int64_t panel = column / kPanelColumns * ROWS * kRowBytes;
            const int64_t ours = model::swizzled(panel + row * kRowBytes + column % kPanelColumns * 2);
            check::that(ours == layout(row, column) * 2, "place", {double(row), double(column)});
        }
    }
}

// A layout of CuTe's gives row + ROWS * column of number i of a thread.
template <int ROWS, class Layout, class Place>
void check_fragment(const Layout& layout, int threads, int numbers, const Place& place) {
    for (int thread = 0; thread < threads; ++thread) {
        for (int i = 0; i < numbers; ++i) {
            const model::Element ours = place(thread, i);
            const int theirs = layout(thread, i);
            check::that(ours.row + ROWS * ours.column == theirs, "place", {double(thread), double(i)});
        }
    }
}

model::Element number_of_a(int thread, int i) {
    const model::Element pair = model::of_a(thread, i / 2);
    return {pair.row, pair.column + i % 2};
}

// CuTe counts B as [columns][depth].
model::Element number_of_b(int thread, int i) {
    const model::Element pair = model::of_b(thread, i / 2);
    return {pair.column, pair.row + i % 2};
}

}  // namespace

int main() {
    check::group("k_major", [] {
        check_k_major<96, 64>(), check_k_major<64, 128>(), check_k_major<32, 256>(), check_k_major<128, 256>();
    });
    check::group("mn_major", [] {
        check_mn_major<96, 64>(), check_mn_major<128, 64>(), check_mn_major<64, 128>(), check_mn_major<32, 256>();
    });
    check::group("swizzle", [] { check_swizzle<96, 64>(), check_swizzle<128, 256>(); });
    check::group("fragments", [] {
        check_fragment<64>(SM90::GMMA::CLayout_64x256{}, 128, 128, model::accumulator);
        check_fragment<64>(SM90::GMMA::ALayout_64x16{}, 128, 8, number_of_a);
        using Warps = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
        check_fragment<16>(Warps::CLayout{}, 32, 4, model::accumulator);
        check_fragment<16>(Warps::ALayout{}, 32, 8, number_of_a);
        check_fragment<8>(Warps::BLayout{}, 32, 4, number_of_b);
    });
    check::group("fields", [] {
        cute::GmmaDescriptor made(descriptor_bits(0x2a400, 0x5800, 0x400));
        check::that(made.bitfield.start_address_ == 0x2a40, "address");
        check::that(made.bitfield.leading_byte_offset_ == 0x580, "leading offset");
        check::that(made.bitfield.stride_byte_offset_ == 0x40, "stride offset");
        check::that(made.bitfield.base_offset_ == 0, "base offset");
        check::that(made.bitfield.layout_type_ == uint8_t(SM90::GMMA::LayoutType::B128), "swizzle");
        check::that(advance(k_major_bits(1024), 96) == k_major_bits(1024 + 96), "advance");
    });
    return 0;
}
