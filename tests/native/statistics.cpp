// The accumulators that host and device compile (csrc/statistics), against sums in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "statistics/candidates.h"
#include "statistics/softmax.h"

using namespace attncap;

namespace {

struct Row {
    std::vector<float> x;
    float unit, position;
};

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(check::random); }

int below(int end) { return int(check::random() % unsigned(end)); }

Row random_row() {
    Row row;
    const float magnitude = std::pow(10.0f, uniform(-2, 3));
    row.x.resize(size_t(1 + below(200)));
    for (float& x : row.x) x = uniform(-magnitude, magnitude);
    if (below(3) == 0) std::sort(row.x.begin(), row.x.end());
    row.unit = std::pow(10.0f, uniform(-2, 1));
    row.position = float(below(300));
    return row;
}

// Keys first .. last - 1 of a row, a tile of `step` at a time, as a kernel walks them.
Partial walked(const Row& row, size_t first, size_t last, size_t step) {
    float peak = hidden_score(row.unit);
    RowSums sums;
    for (size_t begin = first; begin < last; begin += step) {
        const size_t end = std::min(begin + step, last);
        const float old = peak;
        for (size_t j = begin; j < end; ++j) peak = larger(peak, row.x[j]);
        sums = rescaled(sums, rescaling(old * row.unit, peak * row.unit));
        for (size_t j = begin; j < end; ++j) {
            const float t = fmaf(row.x[j], row.unit, -(peak * row.unit)), p = power_of_two(t);
            sums = added(sums, {p, p * t, p * p, p * std::fabs(row.position - float(j))});
        }
    }
    return {peak * row.unit, sums};
}

struct Exact {
    double lse, entropy, collision, distance, null_mass, largest;
};

Exact exact(const Row& row, bool null_given, float null_bits) {
    double peak = null_given ? null_bits : -HUGE_VAL, largest = -HUGE_VAL;
    for (float x : row.x) {
        peak = std::max(peak, double(x) * row.unit);
        largest = std::max(largest, double(x));
    }
    double total = null_given ? std::exp2(null_bits - peak) : 0.0;
    for (float x : row.x) total += std::exp2(double(x) * row.unit - peak);
    Exact is = {(peak + std::log2(total)) * std::log(2.0), 0, 0, 0, 0, largest};
    const auto add_entropy = [&](double p) { is.entropy -= p > 0 ? p * std::log(p) : 0.0; };
    for (size_t j = 0; j < row.x.size(); ++j) {
        const double p = std::exp2(double(row.x[j]) * row.unit - peak) / total;
        add_entropy(p);
        is.collision += p * p;
        is.distance += p * std::fabs(row.position - double(j));
    }
    is.null_mass = null_given ? std::exp2(null_bits - peak) / total : 0.0;
    add_entropy(is.null_mass);
    return is;
}

void near(const char* what, double got, double want, double allowed) {
    check::that(std::fabs(got - want) <= allowed, what, {got, want, allowed});
}

void compare(const Row& row, const Partial& all, bool null_given, float null_bits) {
    float peak = -LARGEST;
    for (float x : row.x) peak = larger(peak, x);
    const RowResult got =
        finished(all.sums, peak, hidden_score(row.unit), row.unit, row.unit * LN_2, null_given, null_bits);
    const Exact want = exact(row, null_given, null_bits);
    // Scores of some size are known to the bits that float32 leaves them.
    const double rounding = 1e-6 + 4e-7 * std::fabs(want.lse) + 4e-7 * std::fabs(want.largest * row.unit);
    check::that(got.sees, "the row sees keys");
    near("lse", got.lse, want.lse, rounding);
    near("max_logit", got.max_logit, want.largest * row.unit * std::log(2.0), rounding);
    near("entropy", got.entropy, want.entropy, 20 * rounding);
    near("collision", got.collision, want.collision, 10 * rounding);
    near("distance", got.distance, want.distance, 300 * 10 * rounding);
    near("null_mass", got.null_mass, want.null_mass, 10 * rounding);
    for (float x : {row.x.front(), row.x.back()}) {
        const double p = std::exp2(double(x) * row.unit - double(got.scale.reference) - double(got.scale.bits));
        near("probability by the row's scale", p, std::exp(double(x) * row.unit * std::log(2.0) - want.lse),
             10 * rounding);
        const double by_share = std::exp2(double(x) * row.unit - double(peak * row.unit)) * got.share;
        near("probability by the row's share", by_share, p, 10 * rounding);
    }
}

void rows() {
    for (int i = 0; i < 3000; ++i) {
        const Row row = random_row();
        const bool null_given = below(2) == 0;
        const float null_bits = below(10) == 0 ? -infinity() : uniform(-300, 300);
        const bool counts = null_given && null_bits > -infinity();
        compare(row, walked(row, 0, row.x.size(), size_t(1 + below(40))), counts, counts ? null_bits : 0.0f);
    }
}

// A row's parts, in any order, some of them empty.
void parts() {
    for (int i = 0; i < 2000; ++i) {
        const Row row = random_row();
        const size_t cut = size_t(below(int(row.x.size()) + 1)), step = size_t(1 + below(40));
        const Partial first = walked(row, 0, cut, step), second = walked(row, cut, row.x.size(), step);
        compare(row, below(2) == 0 ? joined(first, second) : joined(second, first), false, 0.0f);
    }
}

void no_keys() {
    for (float unit : {1e-3f, 1.0f, 1e4f}) {
        for (bool null_given : {false, true}) {
            const RowResult row = finished({}, hidden_score(unit), hidden_score(unit), unit, unit, null_given, 3.0f);
            check::that(!row.sees && row.lse == -infinity() && row.max_logit == -infinity(), "no key: lse");
            check::that(row.entropy == 0 && row.collision == 0 && row.distance == 0, "no key: sums");
            check::that(row.null_mass == 0 && row.share == 0, "no key: masses");
            check::that(power_of_two(5.0f - row.scale.reference - row.scale.bits) == 0.0f, "no key: probabilities");
        }
        // A tile of hidden keys before the first seen one leaves nothing of itself.
        Row row{{2.0f, 1.0f}, unit, 0.0f};
        Partial hidden = {hidden_score(unit) * unit, {64.0f, 0.0f, 64.0f, 1000.0f}};
        compare(row, joined(hidden, walked(row, 0, 2, 1)), false, 0.0f);
    }
}

void caps() {
    for (int i = 0; i < 4000; ++i) {
        const float cap = std::pow(10.0f, uniform(-1, 3)), x = cap * uniform(-1, 1) * std::pow(10.0f, uniform(-4, 2));
        const double want = double(cap) * std::tanh(double(x) * double(1.0f / cap));
        near("capped", soft_capped(x, 1.0f / cap, cap), want, 1e-6 * std::fabs(want));
    }
}

void order() {
    const Candidate sorted[] = {{2.0f, 5}, {1.0f, 0}, {1.0f, 3}, {0.0f, 1}, {-0.0f, 2}, {-1.0f, 0}, no_candidate()};
    for (int i = 0; i < 7; ++i)
        for (int j = 0; j < 7; ++j)
            check::that(precedes(sorted[i], sorted[j]) == (i < j), "order of candidates", {double(i), double(j)});
    const float nan = std::nanf("");
    check::that(!precedes({nan, 0}, {1.0f, 0}) && !precedes({1.0f, 0}, {nan, 0}), "what is no number has no place");
}

void best() {
    for (int i = 0; i < 500; ++i) {
        Best<3> kept;
        kept.clear(-1e30f);
        std::vector<float> all(size_t(1 + below(30)));
        for (float& x : all) kept.add(x = float(below(10)));
        std::sort(all.rbegin(), all.rend());
        for (size_t j = 0; j < 3; ++j) {
            const float want = j < all.size() ? all[j] : -1e30f;
            check::that(kept.score[j] == want, "the few largest", {double(kept.score[j]), double(want)});
        }
        check::that(kept.least() == kept.score[2], "the least of them");
    }
}

// Lists as four threads keep them: what is cut leaves the first in order, taken one by one.
void lists() {
    for (int i = 0; i < 500; ++i) {
        Candidate memory[4 * 64];
        std::vector<Candidate> all;
        CandidateList list = {memory + below(4), 4, 0};
        const int count = below(60), kinds = 1 + below(20);
        for (int j = 0; j < count; ++j) {
            all.push_back({float(below(kinds)), count - j});
            list.append(all.back());
        }
        std::sort(all.begin(), all.end(), precedes);
        const int kept = below(count + 1);
        Candidate last = {infinity(), -1};
        for (int j = 0; j < kept; ++j) {
            last = list.next(last);
            check::that(last.key == all[size_t(j)].key, "the next in order", {double(last.key), double(j)});
        }
        list.cut(last);
        check::that(list.count == kept, "as many as were taken stay", {double(list.count), double(kept)});
        check::that(list.next(last).score == -infinity(), "none comes after the last");
        const float bound = float(below(kinds + 2)) - 1.0f;
        long reaching = 0;
        for (int j = 0; j < kept; ++j) reaching += all[size_t(j)].score >= bound;
        check::that(list.reaching(bound) == reaching, "scores that reach a bound", {double(reaching)});
    }
}

}  // namespace

int main() {
    check::group("rows", rows);
    check::group("parts", parts);
    check::group("no_keys", no_keys);
    check::group("caps", caps);
    check::group("order", order);
    check::group("best", best);
    check::group("lists", lists);
}
