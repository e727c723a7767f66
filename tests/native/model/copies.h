// What is copied into shared memory while the threads go on: tiles by TMA, and 16 bytes at a time by cp.async.
// Until a copy is done its place holds NaNs: nobody may read it any more, nor yet.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "cuda/descriptor.h"
#include "cuda/tensor_shape.h"
#include "model/barriers.h"
#include "model/memory.h"
#include "model/schedule.h"

namespace attncap {
namespace device {
namespace model {

// Chunks of 16 bytes change places within a group of eight rows of 128 bytes.
inline int64_t swizzled(int64_t address) { return address ^ (address >> 7 & 7) << 4; }

class TileLoads : public Engine {
  public:
    TileLoads(Memory* memory, Barriers* barriers) : memory_(*memory), barriers_(*barriers) {}

    void issue(const TensorShape& tensor, uint64_t* barrier, void* destination, const int (&first)[4]) {
        barriers_.require_fence();
        const int bytes = tensor.box_rows * kRowBytes;
        const uint32_t address = memory_.address(destination, bytes, "load_tile");
        if (address % kGroupBytes != 0) throw Fault("load_tile: a panel starts at a multiple of 1024 bytes");
        std::memset(destination, kPoison, size_t(bytes));
        loads_.push_back({tensor, barrier, address, {first[0], first[1], first[2], first[3]}});
    }

    bool step(Random* random) override {
        if (loads_.empty()) return false;
        std::swap(loads_[size_t(random->below(int(loads_.size())))], loads_.back());
        const Load load = loads_.back();
        loads_.pop_back();
        for (int row = 0; row < load.tensor.box_rows; ++row) copy_row(load, row);
        barriers_.complete_bytes(load.barrier, load.tensor.box_rows * kRowBytes);
        return true;
    }

    void check_done() const {
        if (!loads_.empty()) throw Fault("load_tile: the block ends while tiles are under way");
    }

  private:
    struct Load {
        TensorShape tensor;
        uint64_t* barrier;
        uint32_t address;
        int first[4];
    };
    Memory& memory_;
    Barriers& barriers_;
    std::vector<Load> loads_;

    void copy_row(const Load& load, int row) {
        constexpr int kChunkBytes = 16;
        uint16_t numbers[kPanelColumns] = {};
        read_row(load, row, numbers);
        for (int chunk = 0; chunk < kRowBytes / kChunkBytes; ++chunk) {
            const int64_t to = swizzled(load.address + row * kRowBytes + chunk * kChunkBytes);
            std::memcpy(memory_.at(to, kChunkBytes, "load_tile"), numbers + chunk * kChunkBytes / 2, kChunkBytes);
        }
    }

    // What of a row of the box lies in the tensor; the rest stays as it is.
    static void read_row(const Load& load, int row, uint16_t* numbers) {
        const TensorShape& tensor = load.tensor;
        const int64_t index[4] = {load.first[0], int64_t(load.first[1]) + row, load.first[2], load.first[3]};
        const char* from = static_cast<const char*>(tensor.base);
        for (int i = 1; i < 4; ++i) {
            if (index[i] < 0 || index[i] >= tensor.size[i]) return;
            from += index[i] * tensor.stride_bytes[i - 1];
        }
        const int64_t begin = std::clamp<int64_t>(-index[0], 0, kPanelColumns);
        const int64_t end = std::clamp<int64_t>(tensor.size[0] - index[0], begin, kPanelColumns);
        if (begin == end) return;
        std::memcpy(numbers + begin, from + 2 * (index[0] + begin), size_t(2 * (end - begin)));
    }
};

class ChunkCopies : public Engine {
  public:
    ChunkCopies(Schedule* schedule, Memory* memory)
        : schedule_(*schedule), memory_(*memory), of_thread_(size_t(schedule->threads())) {}

    void issue(void* destination, const void* source, bool exists) {
        if (memory_.address(destination, kBytes, "copy_async") % kBytes != 0) {
            throw Fault("copy_async: the place is not aligned to 16 bytes");
        }
        if (exists && reinterpret_cast<uintptr_t>(source) % kBytes != 0) {
            throw Fault("copy_async: the source is not aligned to 16 bytes");
        }
        std::memset(destination, kPoison, kBytes);
        OfThread& mine = of_current();
        mine.under_way.push_back(
            {static_cast<char*>(destination), exists ? static_cast<const char*>(source) : nullptr, mine.groups});
        ++under_way_;
    }

    void commit() { ++of_current().groups; }

    void wait(int groups_under_way) {
        OfThread& mine = of_current();
        const auto awaited = [&](const Copy& copy) { return copy.group < mine.groups - groups_under_way; };
        for (const Copy& copy : mine.under_way) {
            if (awaited(copy)) perform(copy);
        }
        mine.under_way.erase(std::remove_if(mine.under_way.begin(), mine.under_way.end(), awaited),
                             mine.under_way.end());
    }

    bool step(Random* random) override {
        if (under_way_ == 0) return false;
        const int count = int(of_thread_.size()), first = random->below(count);
        for (int i = 0; i < count; ++i) {
            std::vector<Copy>& copies = of_thread_[size_t((first + i) % count)].under_way;
            if (copies.empty()) continue;
            std::swap(copies[size_t(random->below(int(copies.size())))], copies.back());
            perform(copies.back());
            copies.pop_back();
            return true;
        }
        return false;
    }

  private:
    static constexpr size_t kBytes = 16;
    struct Copy {
        char* to;
        const char* from;  // null: zeros
        int64_t group;
    };
    struct OfThread {
        std::vector<Copy> under_way;
        int64_t groups = 0;  // committed
    };
    Schedule& schedule_;
    Memory& memory_;
    std::vector<OfThread> of_thread_;
    int64_t under_way_ = 0;

    OfThread& of_current() { return of_thread_[size_t(schedule_.current())]; }

    void perform(const Copy& copy) {
        --under_way_;
        if (copy.from) {
            std::memcpy(copy.to, copy.from, kBytes);
        } else {
            std::memset(copy.to, 0, kBytes);
        }
    }
};

}  // namespace model
}  // namespace device
}  // namespace attncap
