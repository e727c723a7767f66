// Lanes<T>: every primitive against plain loops.
#pragma once

#include <limits>
#include <utility>

#include "check.h"
#include "cpu/simd.h"

namespace attncap {
namespace ATTNCAP_ISA {

// The same number, bit for bit, but for NaNs, which are all alike.
template <class T>
bool same(T a, T b) {
    return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class T>
std::vector<T> special_numbers() {
    using Limits = std::numeric_limits<T>;
    const T inf = Limits::infinity(), tiny = Limits::denorm_min();
    return {0,
            T(-0.0),
            1,
            -1,
            T(0.1),
            T(-2.5),
            Limits::min(),
            -Limits::min(),
            Limits::max(),
            -Limits::max(),
            inf,
            -inf,
            tiny,
            -tiny,
            Limits::quiet_NaN()};
}

// Every pair of special numbers, and random ones; as many as fill whole vectors.
template <class T>
std::vector<std::pair<T, T>> pairs_of_numbers() {
    std::vector<std::pair<T, T>> pairs;
    for (T a : special_numbers<T>()) {
        for (T b : special_numbers<T>()) pairs.push_back({a, b});
    }
    for (int i = 0; i < 300; ++i) pairs.push_back({T(check::uniform(-9, 9)), T(check::uniform(-9, 9))});
    while (pairs.size() % Lanes<T>::kWidth != 0) pairs.push_back({0, 0});
    return pairs;
}

template <class T>
typename Lanes<T>::M mask_of(unsigned set) {
    T lanes[Lanes<T>::kWidth];
    for (int i = 0; i < Lanes<T>::kWidth; ++i) lanes[i] = T((set >> i) & 1);
    return Lanes<T>::less(Lanes<T>::all(0), Lanes<T>::load(lanes));
}

template <class T>
unsigned lanes_of(typename Lanes<T>::M mask) {
    typename Lanes<T>::Int ones[Lanes<T>::kWidth];
    Lanes<T>::store_int(ones, Lanes<T>::select_int(mask, Lanes<T>::all_int(1), Lanes<T>::all_int(0)));
    unsigned set = 0;
    for (int i = 0; i < Lanes<T>::kWidth; ++i) set |= unsigned(ones[i] & 1) << i;
    return set;
}

// Calls body(a, b) for two vectors of numbers and their lanes.
template <class T, class Body>
void for_vectors_of_pairs(Body body) {
    const auto pairs = pairs_of_numbers<T>();
    for (size_t first = 0; first < pairs.size(); first += Lanes<T>::kWidth) {
        T a[Lanes<T>::kWidth], b[Lanes<T>::kWidth];
        for (int i = 0; i < Lanes<T>::kWidth; ++i) a[i] = pairs[first + i].first, b[i] = pairs[first + i].second;
        body(a, b);
    }
}

template <class T>
void check_memory() {
    using L = Lanes<T>;
    using Int = typename L::Int;
    T numbers[3 * L::kWidth], copy[3 * L::kWidth];
    Int whole[3 * L::kWidth], whole_copy[3 * L::kWidth];
    for (int i = 0; i < 3 * L::kWidth; ++i) numbers[i] = T(i + 0.5), whole[i] = Int(-i * 1000003);
    for (int shift = 0; shift < L::kWidth; ++shift) {  // at any address
        std::fill(copy, copy + 3 * L::kWidth, T(-1));
        std::fill(whole_copy, whole_copy + 3 * L::kWidth, Int(-1));
        L::store(copy + L::kWidth + shift, L::load(numbers + shift));
        L::store_int(whole_copy + L::kWidth + shift, L::load_int(whole + shift));
        for (int i = 0; i < 3 * L::kWidth; ++i) {
            const int from = i - L::kWidth;
            const bool inside = from >= shift && from < shift + L::kWidth;
            check::that(copy[i] == (inside ? numbers[from] : T(-1)), "load, store: lane", {double(shift), double(i)});
            check::that(whole_copy[i] == (inside ? whole[from] : Int(-1)), "load_int, store_int: lane", {double(i)});
        }
    }
    for (T number : special_numbers<T>()) {
        L::store(copy, L::all(number));
        for (int i = 0; i < L::kWidth; ++i) check::that(same(copy[i], number), "all", {number, copy[i]});
    }
    for (Int number : {std::numeric_limits<Int>::min(), Int(-1), Int(0), std::numeric_limits<Int>::max()}) {
        L::store_int(whole_copy, L::all_int(number));
        for (int i = 0; i < L::kWidth; ++i) check::that(whole_copy[i] == number, "all_int", {double(number)});
    }
}

template <class T>
void check_arithmetic() {
    using L = Lanes<T>;
    for_vectors_of_pairs<T>([](const T* a, const T* b) {
        T product[L::kWidth], most[L::kWidth], least[L::kWidth], magnitude[L::kWidth], lanes[L::kWidth];
        L::store(product, L::fma(L::load(a), L::load(b), L::all(T(0.375))));
        L::store(most, L::max(L::load(a), L::load(b)));
        L::store(least, L::min(L::load(a), L::load(b)));
        L::store(magnitude, L::abs(L::load(a)));
        L::store(lanes, L::from_bits(L::bits(L::load(a))));
        for (int i = 0; i < L::kWidth; ++i) {
            const T x = a[i], y = b[i], fused = std::fma(x, y, T(0.375));
            const volatile T rounded = x * y;
            const bool right = same(product[i], fused) || same(product[i], T(rounded + T(0.375)));
            check::that(right, "fma of", {x, y, product[i]});
            check::that(same(most[i], x > y ? x : y) || (x == 0 && y == 0), "max of", {x, y, most[i]});
            check::that(same(least[i], x < y ? x : y) || (x == 0 && y == 0), "min of", {x, y, least[i]});
            check::that(same(magnitude[i], std::fabs(x)), "abs of", {x, magnitude[i]});
            check::that(std::memcmp(lanes + i, a + i, sizeof x) == 0, "bits and back of", {x});
        }
    });
    for (int turn = 0; turn < 50; ++turn) {
        const auto numbers = check::integers<T>(L::kWidth, 1000);
        T total = 0, floats[L::kWidth];
        typename L::Int whole[L::kWidth];
        for (int i = 0; i < L::kWidth; ++i) total += numbers[i], whole[i] = typename L::Int(numbers[i]) * 9001;
        check::that(L::sum(L::load(numbers.data())) == total, "sum", {total});
        L::store(floats, L::to_float(L::load_int(whole)));
        for (int i = 0; i < L::kWidth; ++i) check::that(floats[i] == T(whole[i]), "to_float of", {double(whole[i])});
    }
}

template <class T>
void check_compare() {
    using L = Lanes<T>;
    for_vectors_of_pairs<T>([](const T* a, const T* b) {
        const unsigned less = lanes_of<T>(L::less(L::load(a), L::load(b)));
        const unsigned less_equal = lanes_of<T>(L::less_equal(L::load(a), L::load(b)));
        const unsigned equal = lanes_of<T>(L::equal(L::load(a), L::load(b)));
        const unsigned above = lanes_of<T>(L::above(L::load(a), L::load(b)));
        for (int i = 0; i < L::kWidth; ++i) {
            check::that(((less >> i) & 1) == unsigned(a[i] < b[i]), "less of", {a[i], b[i]});
            check::that(((less_equal >> i) & 1) == unsigned(a[i] <= b[i]), "less_equal of", {a[i], b[i]});
            check::that(((equal >> i) & 1) == unsigned(a[i] == b[i]), "equal of", {a[i], b[i]});
            check::that(((above >> i) & 1) == unsigned(!(a[i] <= b[i])), "above of", {a[i], b[i]});
        }
    });
    using Int = typename L::Int;
    const Int numbers[] = {std::numeric_limits<Int>::min(), -2, -1, 0, 1, 2, std::numeric_limits<Int>::max()};
    for (Int a : numbers) {
        for (Int b : numbers) {
            const unsigned every = (2u << (L::kWidth - 1)) - 1;
            const unsigned less = lanes_of<T>(L::less_int(L::all_int(a), L::all_int(b)));
            const unsigned equal = lanes_of<T>(L::equal_int(L::all_int(a), L::all_int(b)));
            check::that(less == (a < b ? every : 0), "less_int of", {double(a), double(b)});
            check::that(equal == (a == b ? every : 0), "equal_int of", {double(a), double(b)});
        }
    }
}

// What is done with masks, for every mask there is.
template <class T>
void check_masks() {
    using L = Lanes<T>;
    T a[L::kWidth], b[L::kWidth], chosen[L::kWidth], fused[L::kWidth];
    typename L::Int whole[L::kWidth];
    for (int i = 0; i < L::kWidth; ++i) a[i] = T(i + 1), b[i] = T(-i - 1);
    b[L::kWidth - 1] = T(NAN), a[0] = T(INFINITY);
    const unsigned masks = 1u << L::kWidth;
    for (unsigned set = 0; set < masks; ++set) {
        const auto mask = mask_of<T>(set);
        const unsigned other = (set * 2654435761u) % masks;
        check::that(lanes_of<T>(mask) == set, "select_int by", {double(set)});
        check::that(L::any(mask) == (set != 0), "any of", {double(set)});
        check::that(lanes_of<T>(L::either(mask, mask_of<T>(other))) == (set | other), "either", {double(set)});
        L::store(chosen, L::select(mask, L::load(a), L::load(b)));
        L::store_int(whole, L::select_int(mask, L::all_int(7), L::all_int(-7)));
        L::store(fused, L::fma_kept(mask, L::all(2), L::load(b), L::load(a)));
        for (int i = 0; i < L::kWidth; ++i) {
            const bool here = (set >> i) & 1;
            check::that(same(chosen[i], here ? a[i] : b[i]), "select by", {double(set)});
            check::that(whole[i] == (here ? 7 : -7), "select_int by", {double(set)});
            check::that(same(fused[i], here ? 2 * b[i] + a[i] : a[i]), "fma_kept by", {double(set)});
        }
    }
}

// Numbers at any places, of which no two are the same.
template <class T>
void check_places() {
    using L = Lanes<T>;
    constexpr int kNumbers = 4 * L::kWidth;
    T memory[kNumbers], after[kNumbers], gathered[L::kWidth], scattered[L::kWidth];
    typename L::Int places[kNumbers];
    for (int i = 0; i < kNumbers; ++i) memory[i] = after[i] = T(i), places[i] = typename L::Int(i);
    std::shuffle(places, places + kNumbers, check::random);
    const auto at = L::load_int(places);
    L::store(gathered, L::gather(memory, at));
    for (int i = 0; i < L::kWidth; ++i) scattered[i] = T(-i - 1);
    L::scatter(after, at, L::load(scattered));
    for (int i = 0; i < L::kWidth; ++i) {
        check::that(gathered[i] == T(places[i]), "gather", {double(i)});
        memory[places[i]] = scattered[i];
    }
    for (int i = 0; i < kNumbers; ++i) check::that(after[i] == memory[i], "scatter", {double(i)});
}

template <class T>
void check_transpose() {
    using L = Lanes<T>;
    typename L::V square[L::kWidth];
    T lanes[L::kWidth];
    for (int i = 0; i < L::kWidth; ++i) {
        for (int j = 0; j < L::kWidth; ++j) lanes[j] = T(100 * i + j);
        square[i] = L::load(lanes);
    }
    L::transpose(square);
    for (int i = 0; i < L::kWidth; ++i) {
        L::store(lanes, square[i]);
        for (int j = 0; j < L::kWidth; ++j)
            check::that(lanes[j] == T(100 * j + i), "transpose", {double(i), double(j)});
    }
}

template <class T>
void check_sum_each() {
    using L = Lanes<T>;
    for (int turn = 0; turn < 50; ++turn) {
        const auto numbers = check::integers<T>(L::kWidth * L::kWidth, 100);
        const int odd = turn % (L::kWidth + 1);  // a vector with a NaN, which stays in its own sum; or none
        typename L::V vectors[L::kWidth];
        T sums[L::kWidth];
        for (int i = 0; i < L::kWidth; ++i) {
            T lanes[L::kWidth];
            std::copy(&numbers[i * L::kWidth], &numbers[i * L::kWidth] + L::kWidth, lanes);
            if (i == odd) lanes[turn % L::kWidth] = T(NAN);
            vectors[i] = L::load(lanes);
        }
        L::store(sums, L::sum_each(vectors));
        for (int i = 0; i < L::kWidth; ++i) {
            T total = 0;
            for (int j = 0; j < L::kWidth; ++j) total += numbers[i * L::kWidth + j];
            check::that(same(sums[i], i == odd ? T(NAN) : total), "sum_each", {double(i), total, sums[i]});
        }
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
