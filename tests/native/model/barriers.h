// mbarriers, which live in shared memory and count arrivals and bytes, and the sixteen named barriers, which count
// threads.
#pragma once

#include <array>
#include <cstring>
#include <string>
#include <unordered_map>

#include "model/memory.h"
#include "model/schedule.h"

namespace attncap {
namespace device {
namespace model {

class Barriers {
  public:
    Barriers(Schedule* schedule, const Memory* memory) : schedule_(*schedule), memory_(*memory) {}

    void init(uint64_t* at, int arrivals) {
        if (arrivals < 1 || arrivals > kMostArrivals)
            throw Fault(name(at) + ": cannot count " + std::to_string(arrivals));
        if (reinterpret_cast<uintptr_t>(at) % sizeof *at != 0) throw Fault(name(at) + ": not aligned to 8 bytes");
        State state;
        std::memcpy(&state, at, sizeof state);
        if (state.mark == kMark) throw Fault(name(at) + ": initialised twice");
        state = State();
        state.mark = kMark;
        state.arrivals = state.pending = unsigned(arrivals);
        store(at, state);
        fenced_ = false;
    }

    void fence() { fenced_ = true; }

    // Before TMA is told of an mbarrier.
    void require_fence() const {
        if (!fenced_) throw Fault("load_tile: no barrier_fence since the last barrier_init");
    }

    void arrive(uint64_t* at, int expected_bytes) {
        State state = load(at);
        state.bytes += expected_bytes;
        if (state.pending == 0) throw Fault(name(at) + ": more arrivals than it counts");
        --state.pending;
        complete_phase(at, state);
    }

    void complete_bytes(uint64_t* at, int bytes) {
        State state = load(at);
        if (state.bytes < bytes) throw Fault(name(at) + ": more bytes than it expects");
        state.bytes -= bytes;
        complete_phase(at, state);
    }

    void wait(uint64_t* at, int parity) {
        if (parity != 0 && parity != 1)
            throw Fault(name(at) + ": a phase has parity 0 or 1, not " + std::to_string(parity));
        schedule_.wait_until(
            &waiting_[at], [&] { return int(load(at).parity) != parity; },
            [&] {
                const State state = load(at);
                return name(at) + ", phase of parity " + std::to_string(parity) + ": " + std::to_string(state.pending) +
                       " of " + std::to_string(state.arrivals) + " arrivals and " + std::to_string(state.bytes) +
                       " bytes are missing";
            });
    }

    void named_arrive(int id, int threads) {
        require_named(id, threads);
        Named& barrier = named_[size_t(id)];
        if (barrier.arrived == 0) barrier.threads = threads;
        if (barrier.threads != threads) {
            throw Fault(name(id) + ": for " + std::to_string(barrier.threads) + " and for " + std::to_string(threads) +
                        " threads at once");
        }
        uint32_t& lanes = barrier.lanes[size_t(schedule_.current() / kWarp)];
        const uint32_t lane = uint32_t(1) << schedule_.current() % kWarp;
        if (lanes & lane) throw Fault(name(id) + ": a thread arrives twice");
        lanes |= lane;
        if (++barrier.arrived < threads) return;
        for (uint32_t& each : barrier.lanes) {
            if (each != 0 && each != kAllOfThem)
                throw Fault(name(id) + ": a part of a warp is there, all of it must be");
            each = 0;
        }
        barrier.arrived = 0;
        ++barrier.phase;
        schedule_.wake(&barrier.waiting);
    }

    void named_sync(int id, int threads) {
        require_named(id, threads);
        Named& barrier = named_[size_t(id)];
        const int64_t phase = barrier.phase;
        named_arrive(id, threads);
        schedule_.wait_until(
            &barrier.waiting, [&] { return barrier.phase > phase; },
            [&] {
                return name(id) + ": " + std::to_string(barrier.arrived) + " of " + std::to_string(barrier.threads) +
                       " threads are there";
            });
    }

  private:
    static constexpr int kMostArrivals = 1023;
    static constexpr unsigned kMark = 0x6d62;
    static constexpr uint32_t kAllOfThem = 0xffffffff;

    // An mbarrier as it lies in shared memory, so that it suffers from what is written over it.
    struct State {
        uint64_t mark : 16;
        uint64_t parity : 1;
        uint64_t arrivals : 10;
        uint64_t pending : 10;
        int64_t bytes : 27;
    };
    static_assert(sizeof(State) == sizeof(uint64_t), "an mbarrier has 64 bits");

    struct Named {
        int threads = 0;
        int arrived = 0;
        std::array<uint32_t, 32> lanes{};  // of each warp, that have arrived
        int64_t phase = 0;
        Queue waiting;
    };

    Schedule& schedule_;
    const Memory& memory_;
    std::array<Named, 16> named_;
    std::unordered_map<const uint64_t*, Queue> waiting_;  // for an mbarrier
    bool fenced_ = true;

    std::string name(const uint64_t* at) const {
        return "the mbarrier at byte " + std::to_string(memory_.address(at, sizeof *at, "mbarrier"));
    }
    static std::string name(int id) { return id == 0 ? "sync_block" : "named barrier " + std::to_string(id); }

    State load(const uint64_t* at) const {
        State state;
        std::memcpy(&state, at, sizeof state);
        if (state.mark != kMark) throw Fault(name(at) + ": not initialised, or overwritten");
        return state;
    }

    void store(uint64_t* at, const State& state) const {
        memory_.address(at, sizeof state, "mbarrier");
        std::memcpy(at, &state, sizeof state);
    }

    void complete_phase(uint64_t* at, State state) {
        const bool complete = state.pending == 0 && state.bytes == 0;
        if (complete) {
            state.parity ^= 1;
            state.pending = state.arrivals;
        }
        store(at, state);
        if (complete) schedule_.wake(&waiting_[at]);
    }

    void require_named(int id, int threads) const {
        const bool holds =
            id >= 0 && id < int(named_.size()) && threads > 0 && threads % kWarp == 0 && threads <= schedule_.threads();
        if (!holds)
            throw Fault("no named barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads");
    }
};

}  // namespace model
}  // namespace device
}  // namespace attncap
