// What each function of the device layer does, against its definition: compiled by a C++ compiler it looks at the model
// of a CTA, compiled by nvcc at the hardware.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "device_kernels.h"

namespace attncap {
namespace device {
namespace {

#if defined(__CUDACC__)
void* shared_with_device(size_t bytes) {
    void* memory = nullptr;
    device::check(cudaMallocManaged(&memory, bytes), "test", "allocating");
    return memory;
}
void give_back(void* memory) { cudaFree(memory); }
void finish() { device::check(cudaDeviceSynchronize(), "test", "running"); }
constexpr int kSeeds = 1;
void set_seed(int) {}
#else
void* shared_with_device(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void give_back(void* memory) { std::free(memory); }
void finish() {}
constexpr int kSeeds = 12;
void set_seed(int seed) { model::seed() = uint64_t(seed); }
#endif

// Numbers that host and device both see; NaNs, or what cannot be right, until they are written.
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : count_(count), data_(static_cast<T*>(shared_with_device(size_t(count) * sizeof(T)))) {
        std::memset(static_cast<void*>(data_), 0xff, size_t(count) * sizeof(T));
    }
    ~Buffer() { give_back(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data() const { return data_; }
    int64_t size() const { return count_; }
    T& operator[](int64_t i) const { return data_[i]; }

  private:
    const int64_t count_;
    T* const data_;
};

template <typename Params>
void run(void (*kernel)(Params), int blocks, int threads, int shared_bytes, const Params& params) {
    launch(kernel, blocks, threads, shared_bytes, Stream(), "test", params);
    finish();
}

template <typename Body>
void for_each_seed(const Body& body) {
    for (int seed = 0; seed < kSeeds; ++seed) {
        set_seed(seed);
        body();
    }
}

// Bits of small integers; both formats hold them exactly, and so are their products' sums in any order.
template <typename T>
uint16_t small(int value) {
    constexpr uint16_t kBFloat[] = {0x0000, 0x3f80, 0x4000, 0x4040}, kHalf[] = {0x0000, 0x3c00, 0x4000, 0x4200};
    const uint16_t size = (std::is_same_v<T, BFloat16> ? kBFloat : kHalf)[std::abs(value)];
    return uint16_t(size | (value < 0 ? 0x8000 : 0));
}

// A matrix of small integers and its 16-bit form.
template <typename T>
struct Matrix {
    Matrix(int rows, int columns)
        : rows(rows), columns(columns), numbers(check::integers<int>(rows * columns)), bits(rows * columns) {
        for (int i = 0; i < rows * columns; ++i) bits[i] = small<T>(numbers[size_t(i)]);
    }
    int at(int row, int column) const { return numbers[size_t(row * columns + column)]; }
    TensorMap map(int box_rows) const {
        const int64_t size[4] = {columns, rows, 1, 1}, stride[3] = {columns * 2, 0, 0};
        return tensor_map(bits.data(), size, stride, box_rows, std::is_same_v<T, BFloat16>);
    }
    const int rows, columns;
    const std::vector<int> numbers;
    const Buffer<uint16_t> bits;
};

void check_loads() {
    // Columns, rows, heads, batch; heads lie within rows, as in (batch, rows, heads, columns), and rows have gaps.
    const int64_t size[4] = {80, 37, 3, 2}, stride[3] = {3 * 96 * 2, 96 * 2, 40 * 3 * 96 * 2};
    const Buffer<uint16_t> tensor(size[3] * stride[2] / 2);
    for (int64_t i = 0; i < tensor.size(); ++i) tensor[i] = uint16_t(i * 7 + 1);
    const int at[][5] = {{16, 0, 0, 0, 0},   {16, 64, 8, 2, 1}, {64, 0, 30, 1, 1}, {40, 17, 5, 0, 1}, {8, -9, -3, 1, 0},
                         {256, 0, 0, 2, 0},  {8, 80, 0, 0, 0},  {8, 0, 37, 0, 0},  {8, 0, 0, 3, 0},   {8, 0, 0, 0, -1},
                         {24, 16, 13, 1, 0}, {8, -64, 0, 0, 0}, {8, 79, 36, 2, 1}};
    for (const auto& [rows, column, row, head, batch] : at) {
        const TensorMap map = tensor_map(tensor.data(), size, stride, rows, true);
        const Buffer<uint16_t> out(rows * kPanelColumns);
        run(load_kernel, 1, 128, 256 * kRowBytes + 64, LoadParams{map, rows, column, row, head, batch, out.data()});
        for (int r = 0; r < rows; ++r) {
            for (int c = 0; c < kPanelColumns; ++c) {
                const int64_t index[4] = {column + c, row + r, head, batch};
                bool inside = true;
                for (int i = 0; i < 4; ++i) inside &= index[i] >= 0 && index[i] < size[i];
                const int64_t from =
                    index[0] + (index[1] * stride[0] + index[2] * stride[1] + index[3] * stride[2]) / 2;
                const int chunk = c / 8 ^ r % 8;
                check::that(out[r * kPanelColumns + chunk * 8 + c % 8] == (inside ? tensor[from] : 0), "element",
                            {double(rows), double(column), double(row), double(r), double(c)});
            }
        }
    }
}

template <typename T, int N>
void check_shared_products() {
    for (int panels = 1; panels <= 2; ++panels) {
        const Matrix<T> a(64, 64 * panels), b(N, 64 * panels);
        const Buffer<float> out(64 * N);
        run(multiply_shared_kernel<T, N>, 1, 128, 2 * 64 * kRowBytes + 2 * kMultiplyPanel + 64,
            MultiplyParams{a.map(64), b.map(N), nullptr, panels, 64 * panels, out.data()});
        for (int row = 0; row < 64; ++row) {
            for (int column = 0; column < N; ++column) {
                int sum = 0;
                for (int k = 0; k < a.columns; ++k) sum += a.at(row, k) * b.at(column, k);
                check::that(out[row * N + column] == float(sum), "element", {double(N), double(row), double(column)});
            }
        }
    }
}

template <typename T, int N>
void check_register_products() {
    const Matrix<T> a(64, 32), b(32, N);
    const Buffer<float> out(64 * N);
    run(multiply_registers_kernel<T, N>, 1, 128, 4 * 32 * kRowBytes + 64,
        MultiplyParams{a.map(64), b.map(32), a.bits.data(), (N + 63) / 64, 32, out.data()});
    for (int row = 0; row < 64; ++row) {
        for (int column = 0; column < N; ++column) {
            int sum = 1;
            for (int k = 0; k < 32; ++k) sum += a.at(row, k) * b.at(k, column);
            check::that(out[row * N + column] == float(sum), "element", {double(N), double(row), double(column)});
        }
    }
}

template <typename T, int... N>
void check_each_product() {
    for_each_seed([] {
        (check_shared_products<T, N>(), ...);
        (check_register_products<T, N>(), ...);
    });
}

template <typename T>
void check_pipeline() {
    for_each_seed([] {
        const Matrix<T> a(128, 64 * 7), b(64, 64 * 7);
        const Buffer<float> out(128 * 64);
        run(pipeline_kernel<T>, 1, 384, 2 * 192 * kRowBytes + 64, PipelineParams{a.map(128), b.map(64), 7, out.data()});
        for (int row = 0; row < 128; ++row) {
            for (int column = 0; column < 64; ++column) {
                int sum = 0;
                for (int k = 0; k < a.columns; ++k) sum += a.at(row, k) * b.at(column, k);
                check::that(out[row * 64 + column] == float(sum), "element", {double(row), double(column)});
            }
        }
    });
}

template <typename T>
void check_fragments() {
    for_each_seed([] {
        const Matrix<T> a(16, 16), b(8, 16);
        const Buffer<float> out(16 * 8);
        run(fragment_kernel<T>, 1, 32, 1024, FragmentParams{a.bits.data(), b.bits.data(), out.data()});
        for (int row = 0; row < 16; ++row) {
            for (int column = 0; column < 8; ++column) {
                int sum = 1;
                for (int k = 0; k < 16; ++k) sum += a.at(row, k) * b.at(column, k);
                check::that(out[row * 8 + column] == float(sum), "element", {double(row), double(column)});
            }
        }
    });
}

void check_copies() {
    for_each_seed([] {
        constexpr int kStages = 5;
        const Buffer<float> in(kStages * 256), out(kStages * 256);
        for (int i = 0; i < kStages * 256; ++i) in[i] = float(i + 1);
        run(copy_kernel, 1, 64, 2 * 1024, CopyParams{in.data(), kStages, out.data()});
        for (int i = 0; i < kStages * 256; ++i) {
            const int from = i / 256 * 256 + (63 - i % 256 / 4) * 4 + i % 4;
            check::that(out[i] == (i / 256 + 1 < kStages ? in[from] : 0.0f), "element", {double(i)});
        }
    });
}

void check_warps() {
    for_each_seed([] {
        const Buffer<uint32_t> in(64), out(64 * 5);
        for (int i = 0; i < 64; ++i) in[i] = uint32_t(check::integer(8, 1 << 30));
        in[37] = 7;
        run(warp_kernel, 3, 64, 0, WarpParams{in.data(), out.data()});
        for (int i = 0; i < 64; ++i) {
            const uint32_t* lanes = &in[i / 32 * 32];
            const uint32_t* got = &out[i * 5];
            check::that(got[0] == lanes[i % 32 ^ 5], "shuffle_xor", {double(i)});
            check::that(got[1] == lanes[i % 32 / 4 * 4] % 1024, "shuffle", {double(i)});
            check::that(got[2] == uint32_t(i >= 32), "any", {double(i)});
            check::that(got[3] == *std::max_element(lanes, lanes + 32), "reduce_max", {double(i)});
            check::that(got[4] >= 300 && got[4] <= 302, "blocks", {double(got[4])});
        }
    });
}

// Whether `rounded`, which `widen` makes of `bits`, is the nearest that a format has to x, and the even one of two.
template <typename Widen>
bool is_nearest(float x, uint16_t bits, const Widen& widen) {
    const double error = std::fabs(double(widen(bits)) - x);
    for (int step : {-1, 1}) {
        const float other = widen(uint16_t(bits + step));
        if (std::isnan(other) || std::isinf(other)) continue;
        const double others = std::fabs(double(other) - x);
        if (others < error || (others == error && bits % 2 == 1)) return false;
    }
    return true;
}

float widened_bfloat(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

float widened_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                       : std::ldexp(float(mantissa + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void check_numbers() {
    std::vector<float> numbers = {0.0f,     -0.0f,   1.0f,      INFINITY, -INFINITY,    NAN,      65504.0f, 65519.0f,
                                  65520.0f, 1e30f,   -3e38f,    0x1p-14f, 0x1.ffcp-15f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f,
                                  1e-30f,   -1e-30f, 0x1p-126f, -126.0f,  -127.0f,      -150.0f,  2049.0f,  2051.0f};
    // Halves of the last bit, which tie.
    for (int bits = 0x0001; bits < 0x7c00; bits += 97) {
        numbers.push_back((widened_half(uint16_t(bits)) + widened_half(uint16_t(bits + 1))) / 2);
        numbers.push_back(widened_half(uint16_t(bits)));
    }
    for (int i = 0; i < 2000; ++i) numbers.push_back(float(check::uniform(-20, 20)));
    const int count = int(numbers.size());
    const Buffer<float> in(count), powers(count);
    const Buffer<uint32_t> packed(2 * count);
    for (int i = 0; i < count; ++i) in[i] = numbers[size_t(i)];
    run(number_kernel, 1, 32, 0, NumberParams{in.data(), count, packed.data(), powers.data()});
    for (int i = 0; i < count; ++i) {
        const float pair[2] = {in[i], -in[(i + 1) % count]};
        for (int half = 0; half < 2; ++half) {
            const float x = pair[half];
            const uint16_t bfloat = uint16_t(packed[2 * i] >> 16 * half),
                           half_bits = uint16_t(packed[2 * i + 1] >> 16 * half);
            if (std::isnan(x) || std::isinf(x)) {
                check::that(same(widened_bfloat(bfloat), x) && same(widened_half(half_bits), x), "not finite", {x});
                continue;
            }
            check::that(is_nearest(x, bfloat, widened_bfloat), "bfloat16", {x, double(bfloat)});
            check::that(std::fabs(x) >= 65520 ? widened_half(half_bits) == std::copysign(INFINITY, x)
                                              : is_nearest(x, half_bits, widened_half),
                        "float16", {x, double(half_bits)});
        }
        const double power = std::exp2(double(in[i])), error = std::fabs(powers[i] - power);
        check::that(std::isnan(in[i]) ? std::isnan(powers[i])
                                      : powers[i] == float(power) || error <= power * 0x1p-21 ||
                                            (power < 0x1.1p-126 && powers[i] == 0),
                    "power_of_two", {in[i], powers[i]});
    }
}

int run_all() {
    check::group("loads", check_loads);
    check::group("products.bfloat16", check_each_product<BFloat16, 32, 64, 96, 128, 256>);
    check::group("products.float16", check_each_product<Float16, 32, 64, 96, 128, 256>);
    check::group("pipeline.bfloat16", check_pipeline<BFloat16>);
    check::group("pipeline.float16", check_pipeline<Float16>);
    check::group("fragments.bfloat16", check_fragments<BFloat16>);
    check::group("fragments.float16", check_fragments<Float16>);
    check::group("copies", check_copies);
    check::group("warps", check_warps);
    check::group("numbers", check_numbers);
    return 0;
}

}  // namespace
}  // namespace device
}  // namespace attncap

int main() { return attncap::device::run_all(); }
