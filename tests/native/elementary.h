// exp, tanh, log and the next number above, against long double.
#pragma once

#include "cpu/elementary.h"
#include "cpu/topk.h"
#include "lanes.h"

namespace attncap {
namespace ATTNCAP_ISA {

// |got - want| in units of the last place that numbers of want's size have.
template <class T>
double ulps(T got, long double want) {
    int exponent;
    std::frexp(double(want), &exponent);
    exponent = std::max(exponent, std::numeric_limits<T>::min_exponent);
    return double(std::fabs((long double)(got)-want) / std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits));
}

// Numbers from `low` to `high`: many that are evenly spread, and as many whose sizes are (by their bits).
template <class T>
std::vector<T> sweep(double low, double high, int count) {
    std::vector<T> numbers;
    for (int i = 0; i < count; ++i) numbers.push_back(T(check::uniform(low, high)));
    const double most = std::max(std::fabs(low), std::fabs(high));
    for (int i = 0; i < count; ++i) {
        const double size = most * std::exp2(check::uniform(-100, 0));
        for (double x : {size, -size}) {
            if (x >= low && x <= high) numbers.push_back(T(x));
        }
    }
    while (numbers.size() % Lanes<T>::kWidth != 0) numbers.push_back(T(high));
    return numbers;
}

template <class T, class Op>
std::vector<T> evaluated(const std::vector<T>& x, Op op) {
    using L = Lanes<T>;
    std::vector<T> y(x.size());
    for (size_t i = 0; i < x.size(); i += L::kWidth) L::store(&y[i], op(L::load(&x[i])));
    return y;
}

template <class T, class Op, class Exact>
void check_within(double most, const std::vector<T>& x, Op op, Exact exact, const char* what) {
    const auto y = evaluated<T>(x, op);
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double error = ulps<T>(y[i], exact((long double)(x[i])));
        worst = std::max(worst, error);
        check::that(error <= most, what, {x[i], y[i], error});
    }
    char note[64];
    std::snprintf(note, sizeof note, ", at most %.3g ulp", worst);
    check::counts.note += note;
}

constexpr int kSweep = 100000;

template <class T>
void check_exp() {
    using L = Lanes<T>;
    using V = typename L::V;
    const double least = Constants<T>::kExpMin;
    auto op = [](V x) { return exp_nonpositive<T>(x); };
    auto exact = [](long double x) { return std::exp(x); };
    check_within<T>(2, sweep<T>(-16, 0, kSweep), op, exact, "exp of");
    check_within<T>(5, sweep<T>(least, -16, kSweep), op, exact, "exp of");

    const auto low = sweep<T>(100 * least, least, kSweep / 10);
    const auto vanishing = evaluated<T>(low, op);
    for (size_t i = 0; i < low.size(); ++i) {
        const T most = std::max(T(1.0001) * std::exp(low[i]), std::numeric_limits<T>::min());
        check::that(vanishing[i] >= 0 && vanishing[i] <= most, "exp below kExpMin, of", {low[i], vanishing[i]});
    }
    auto one = [&](T x) { return evaluated<T>(std::vector<T>(L::kWidth, x), op)[0]; };
    check::that(one(0) == 1 && one(T(-0.0)) == 1, "exp of 0", {one(0)});
    check::that(one(T(2 * least)) == 0, "exp of 2 kExpMin, which hidden keys have, is 0", {one(T(2 * least))});
    check::that(std::isnan(one(T(NAN))), "exp of NaN", {one(T(NAN))});

    // Side by side or alone: the same bits.
    const auto x = sweep<T>(2 * least, 0, 400);
    for (size_t i = 0; i + 4 * L::kWidth <= x.size(); i += 4 * L::kWidth) {
        V together[4];
        for (int n = 0; n < 4; ++n) together[n] = L::load(&x[i + n * L::kWidth]);
        exp_nonpositive<T>(together);
        for (int n = 0; n < 4; ++n) {
            T lanes[L::kWidth], alone[L::kWidth];
            L::store(lanes, together[n]);
            L::store(alone, op(L::load(&x[i + n * L::kWidth])));
            check::that(std::memcmp(lanes, alone, sizeof lanes) == 0, "exp of four vectors at once", {x[i]});
        }
    }
}

template <class T>
void check_tanh() {
    using L = Lanes<T>;
    auto op = [](typename L::V x) { return tanh<T>(x); };
    check_within<T>(3, sweep<T>(-25, 25, kSweep), op, [](long double x) { return std::tanh(x); }, "tanh of");
    const auto y = evaluated<T>(std::vector<T>(L::kWidth, T(INFINITY)), op);
    const auto z = evaluated<T>(std::vector<T>(L::kWidth, T(-INFINITY)), op);
    const auto none = evaluated<T>(std::vector<T>(L::kWidth, T(NAN)), op);
    check::that(y[0] == 1 && z[0] == -1, "tanh of infinities", {y[0], z[0]});
    check::that(std::isnan(none[0]), "tanh of NaN", {none[0]});
}

template <class T>
void check_log() {
    using L = Lanes<T>;
    auto op = [](typename L::V x) { return log_positive<T>(x); };
    auto exact = [](long double x) { return std::log(x); };
    check_within<T>(3, sweep<T>(std::numeric_limits<T>::min(), 3000, kSweep), op, exact, "log of");
    check_within<T>(3, sweep<T>(0.5, 2, kSweep), op, exact, "log of");
    auto one = [&](T x) { return evaluated<T>(std::vector<T>(L::kWidth, x), op)[0]; };
    check::that(one(1) == 0, "log of 1", {one(1)});
    const T most = std::numeric_limits<T>::max();
    check::that(ulps<T>(one(most), std::log((long double)(most))) < 2, "log of the largest number", {one(most)});
}

template <class T>
void check_next_above() {
    using L = Lanes<T>;
    for_vectors_of_pairs<T>([](const T* a, const T*) {
        T above[L::kWidth];
        L::store(above, next_above<T>(L::load(a)));
        for (int i = 0; i < L::kWidth; ++i) {
            const T want = std::nextafter(a[i], T(INFINITY));
            // Nothing is above infinity and nothing compares with NaN: whatever comes must not be reached.
            const bool right = std::isnan(a[i]) || a[i] == T(INFINITY) ? !(above[i] <= T(INFINITY)) : above[i] == want;
            check::that(right, "next_above of", {a[i], above[i]});
        }
    });
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
