// Multiplications of warpgroups, as asynchronous as wgmma allows: operands are read at some moment between the last
// thread's issue and the wait for it, and accumulators hold NaNs from a thread's issue until its own wait.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cuda/descriptor.h"
#include "model/copies.h"
#include "model/fragments.h"
#include "model/memory.h"
#include "model/number.h"
#include "model/schedule.h"

namespace attncap {
namespace device {
namespace model {

constexpr int kRows = 64;   // of A and the accumulators
constexpr int kDepth = 16;  // of one multiplication

// What all threads of a warpgroup say in the same words.
struct Product {
    float (*to_float)(uint16_t);
    int columns;
    uint64_t a;  // a descriptor; none where A lies in registers
    uint64_t b;
    bool a_in_registers, add;

    bool operator==(const Product& other) const {
        return to_float == other.to_float && columns == other.columns && a == other.a && b == other.b &&
               a_in_registers == other.a_in_registers && add == other.add;
    }
};

class Products : public Engine {
  public:
    Products(Schedule* schedule, Memory* memory)
        : schedule_(*schedule),
          memory_(*memory),
          groups_(size_t(schedule->threads() / kWarpgroup)),
          of_thread_(size_t(schedule->threads())) {}

    void fence() { of_current().fenced = true; }

    void issue(const Product& product, float* accumulators, const uint32_t* a) {
        OfThread& mine = of_current();
        if (!mine.fenced) throw Fault("multiply: no multiply_fence since the last multiply_commit");
        Group& group = group_of_current();
        const int64_t index = mine.issued++;
        if (index == group.first + int64_t(group.queue.size()))
            group.queue.push_back(Issued{product, nullptr, false, {}, 0});
        Issued& issued = group.queue[size_t(index - group.first)];
        if (!(issued.product == product)) throw Fault("multiply: the threads of a warpgroup say different things");
        take_accumulators(&mine, &issued, accumulators, index);
        issued.a[size_t(schedule_.current() % kWarpgroup)] = a;
        ++issued.threads;
    }

    void commit() {
        OfThread& mine = of_current();
        mine.committed.push_back(mine.issued);
        mine.fenced = false;
    }

    void wait(int groups_under_way) {
        OfThread& mine = of_current();
        const int64_t awaited = int64_t(mine.committed.size()) - groups_under_way;
        if (awaited <= 0) return;
        const int64_t end = mine.committed[size_t(awaited - 1)];
        Group& group = group_of_current();
        schedule_.wait_until(
            &group.waiting, [&] { return group.first >= end; },
            [&] {
                return "a multiplication that " + std::to_string(group.queue.front().threads) +
                       " of 128 threads have issued";
            });
        mine.committed.erase(mine.committed.begin(), mine.committed.begin() + awaited);
        give_back(&mine, end);
    }

    bool step(Random* random) override {
        const int count = int(groups_.size()), first = count > 0 ? random->below(count) : 0;
        for (int i = 0; i < count; ++i) {
            Group& group = groups_[size_t((first + i) % count)];
            if (!first_is_ready(group)) continue;
            perform_first(&group);
            return true;
        }
        return false;
    }

    // At a thread's end: its registers are gone.
    void check_thread_done() {
        if (!of_current().lent.empty()) throw Fault("multiply: a thread ends while it has not waited for its products");
    }

  private:
    // The accumulators of a warpgroup while its threads must not look at them.
    struct Tile {
        explicit Tile(int columns) : columns(columns), values(size_t(kRows * columns)) {}
        const int columns;
        std::vector<float> values;
        float* at(Element e) { return &values[size_t(e.row * columns + e.column)]; }
    };
    struct Issued {
        Product product;
        std::shared_ptr<Tile> tile;
        bool starts_tile;
        std::array<const uint32_t*, kWarpgroup> a;
        int threads;
    };
    // Multiplications of a warpgroup in the order of issue; those before `first` are done.
    struct Group {
        std::deque<Issued> queue;
        int64_t first = 0;
        Queue waiting;
    };
    struct Lent {
        float* accumulators;
        std::shared_ptr<Tile> tile;
        int64_t last;  // multiplication into it
    };
    struct OfThread {
        int64_t issued = 0;
        bool fenced = false;
        std::deque<int64_t> committed;  // how many were issued at each commit
        std::vector<Lent> lent;
    };
    Schedule& schedule_;
    Memory& memory_;
    std::vector<Group> groups_;
    std::vector<OfThread> of_thread_;

    OfThread& of_current() { return of_thread_[size_t(schedule_.current())]; }

    Group& group_of_current() {
        const size_t group = size_t(schedule_.current() / kWarpgroup);
        if (group >= groups_.size()) throw Fault("multiply: the last warps are not a whole warpgroup");
        return groups_[group];
    }

    static bool first_is_ready(const Group& group) {
        return !group.queue.empty() && group.queue.front().threads == kWarpgroup;
    }

    void take_accumulators(OfThread* mine, Issued* issued, float* accumulators, int64_t index) {
        for (Lent& lent : mine->lent) {
            if (lent.accumulators != accumulators) continue;
            if (issued->threads == 0) issued->tile = lent.tile;
            if (issued->tile != lent.tile || issued->starts_tile) throw Fault(kDifferentAccumulators);
            lent.last = index;
            return;
        }
        const int columns = issued->product.columns;
        if (issued->threads == 0) {
            issued->tile = std::make_shared<Tile>(columns);
            issued->starts_tile = true;
        }
        if (!issued->starts_tile) throw Fault(kDifferentAccumulators);
        for (int i = 0; i < columns / 2; ++i) {
            *issued->tile->at(accumulator(schedule_.current() % kWarpgroup, i)) = accumulators[i];
            accumulators[i] = std::numeric_limits<float>::quiet_NaN();
        }
        mine->lent.push_back({accumulators, issued->tile, index});
    }
    static constexpr const char* kDifferentAccumulators =
        "multiply: some threads of a warpgroup have accumulators under way that others have waited for";

    // The accumulators whose last multiplication comes before `end`.
    void give_back(OfThread* mine, int64_t end) {
        for (size_t i = 0; i < mine->lent.size();) {
            Lent& lent = mine->lent[i];
            if (lent.last >= end) {
                ++i;
                continue;
            }
            for (int j = 0; j < lent.tile->columns / 2; ++j) {
                lent.accumulators[j] = *lent.tile->at(accumulator(schedule_.current() % kWarpgroup, j));
            }
            mine->lent.erase(mine->lent.begin() + int64_t(i));
        }
    }

    void perform_first(Group* group) {
        const Issued issued = std::move(group->queue.front());
        group->queue.pop_front();
        ++group->first;
        const Product& product = issued.product;
        std::vector<float> a(kRows * kDepth), b(size_t(kDepth * product.columns));
        if (product.a_in_registers) {
            read_registers(issued, a.data());
            read_mn_major(product, b.data());
        } else {
            read_k_major(product.a, kRows, product.to_float, a.data(), kDepth, 1);
            read_k_major(product.b, product.columns, product.to_float, b.data(), 1, product.columns);
        }
        Tile& tile = *issued.tile;
        if (!product.add) std::fill(tile.values.begin(), tile.values.end(), 0.0f);
        add_product(a.data(), b.data(), &tile);
        schedule_.wake(&group->waiting);
    }

    // [64][16] times [16][columns]. Written with vectors, for most of a test's time is spent here; without fused
    // multiplications and additions, so that sums are the same on every machine.
#if defined(__x86_64__) && defined(__GLIBC__)
    __attribute__((target_clones("avx2", "default")))
#endif
    static void add_product(const float* a, const float* b, Tile* tile) {
        typedef float Vector __attribute__((vector_size(32)));
        constexpr int kWidth = sizeof(Vector) / sizeof(float);
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < tile->columns; column += kWidth) {
                Vector sum, factor;
                std::memcpy(&sum, tile->at({row, column}), sizeof sum);
                for (int k = 0; k < kDepth; ++k) {
                    std::memcpy(&factor, b + k * tile->columns + column, sizeof factor);
                    sum += a[row * kDepth + k] * factor;
                }
                std::memcpy(tile->at({row, column}), &sum, sizeof sum);
            }
        }
    }

    static void read_registers(const Issued& issued, float* a) {
        for (int thread = 0; thread < kWarpgroup; ++thread) {
            for (int i = 0; i < 4; ++i) {
                const Element e = of_a(thread, i);
                const uint32_t pair = issued.a[size_t(thread)][i];
                a[e.row * kDepth + e.column] = issued.product.to_float(uint16_t(pair & 0xffff));
                a[e.row * kDepth + e.column + 1] = issued.product.to_float(uint16_t(pair >> 16));
            }
        }
    }

    struct Layout {
        int64_t start, leading, stride;
    };

    static Layout decoded(uint64_t descriptor) {
        const auto field = [&](int bit) { return int64_t(descriptor >> bit & 0x3fff) * 16; };
        if (descriptor >> 62 != 1) throw Fault("multiply: a descriptor without the 128-byte swizzle");
        if ((descriptor >> 49 & 7) != 0)
            throw Fault("multiply: a descriptor of a tile that is not aligned to 1024 bytes");
        return {field(0), field(16), field(32)};
    }

    // Eight numbers that lie side by side, to `to` at a distance of `step`.
    void read_chunk(int64_t address, float (*to_float)(uint16_t), float* to, int64_t step) {
        uint16_t numbers[8];
        std::memcpy(numbers, memory_.at(swizzled(address), sizeof numbers, "multiply"), sizeof numbers);
        for (int i = 0; i < 8; ++i) to[i * step] = to_float(numbers[i]);
    }

    // [rows][16], to distances of row_step and depth_step.
    void read_k_major(uint64_t descriptor, int rows, float (*to_float)(uint16_t), float* to, int64_t row_step,
                      int64_t depth_step) {
        const Layout layout = decoded(descriptor);
        for (int row = 0; row < rows; ++row) {
            const int64_t at = layout.start + row / 8 * layout.stride + row % 8 * kRowBytes;
            for (int k = 0; k < kDepth; k += 8) {
                read_chunk(at + 2 * k, to_float, to + row * row_step + k * depth_step, depth_step);
            }
        }
    }

    // [16][columns]
    void read_mn_major(const Product& product, float* to) {
        const Layout layout = decoded(product.b);
        for (int k = 0; k < kDepth; ++k) {
            const int64_t row = layout.start + k / 8 * layout.stride + k % 8 * kRowBytes;
            for (int column = 0; column < product.columns; column += 8) {
                const int64_t at = row + column / kPanelColumns * layout.leading + column % kPanelColumns * 2;
                read_chunk(at, product.to_float, to + k * product.columns + column, 1);
            }
        }
    }
};

}  // namespace model
}  // namespace device
}  // namespace attncap
