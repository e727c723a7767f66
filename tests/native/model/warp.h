// What the 32 threads of a warp do together.
#pragma once

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "model/schedule.h"

namespace attncap {
namespace device {
namespace model {

// All lanes bring something, the last to come works out what each of them gets.
class Warps {
  public:
    explicit Warps(Schedule* schedule) : schedule_(*schedule), warps_(size_t(schedule->threads() / kWarp)) {}

    // `work(in, out)` is given what the lanes bring and fills in what they get.
    template <class Out, class In, class Work>
    Out meet(const char* what, const In& in, const Work& work) {
        static_assert(sizeof(In) <= kSlot && sizeof(Out) <= kSlot, "what lanes bring and get lies in slots");
        const size_t lane = size_t(schedule_.current() % kWarp);
        Warp& warp = warps_[size_t(schedule_.current() / kWarp)];
        // Two meetings suffice: a lane starts the one after next only when all lanes have left the last.
        const int64_t turn = ++warp.turn[lane];
        Meeting& meeting = warp.meetings[size_t(turn % 2)];
        if (meeting.turn != turn) {
            meeting.turn = turn;
            meeting.what = what;
            meeting.arrived = 0;
        }
        if (std::strcmp(meeting.what, what) != 0) {
            throw Fault(std::string("lanes of a warp part: some are at ") + meeting.what + ", some at " + what);
        }
        std::memcpy(&meeting.in[lane], &in, sizeof in);
        if (++meeting.arrived == kWarp) {
            finish<Out, In>(&meeting, work);
            schedule_.wake(&meeting.waiting);
        }
        schedule_.wait_until(
            &meeting.waiting, [&] { return meeting.arrived == kWarp; },
            [&] { return std::string(what) + ": " + std::to_string(meeting.arrived) + " of 32 lanes are there"; });
        Out out;
        std::memcpy(&out, &meeting.out[lane], sizeof out);
        return out;
    }

  private:
    static constexpr size_t kSlot = 64;
    struct alignas(16) Slot {
        char bytes[kSlot];
    };
    struct Meeting {
        int64_t turn = 0;
        const char* what = "";
        int arrived = 0;
        std::array<Slot, kWarp> in, out;
        Queue waiting;
    };
    struct Warp {
        std::array<int64_t, kWarp> turn{};
        std::array<Meeting, 2> meetings;
    };
    Schedule& schedule_;
    std::vector<Warp> warps_;

    template <class Out, class In, class Work>
    static void finish(Meeting* meeting, const Work& work) {
        In in[kWarp];
        Out out[kWarp];
        for (size_t lane = 0; lane < kWarp; ++lane) std::memcpy(&in[lane], &meeting->in[lane], sizeof(In));
        work(in, out);
        for (size_t lane = 0; lane < kWarp; ++lane) std::memcpy(&meeting->out[lane], &out[lane], sizeof(Out));
    }
};

// Registers that warpgroups give back and claim.
class Registers {
  public:
    // A kernel starts with an equal share of the processor's, in steps of eight; with few threads they do not run
    // short.
    explicit Registers(Schedule* schedule)
        : schedule_(*schedule), share_(kOfProcessor / schedule->threads() / 8 * 8), scarce_(share_ < kMost) {}

    void release(int count) {
        if (!scarce_) return;
        if (count > share_) throw Fault("releases to " + described(count));
        free_ += share_ - count;
        schedule_.wake(&waiting_);
    }

    void claim(int count) {
        if (!scarce_) return;
        if (count < share_) throw Fault("claims " + described(count));
        schedule_.wait_until(
            &waiting_, [&] { return free_ >= count - share_; },
            [&] { return described(count) + ", and the others have released too few"; });
        free_ -= count - share_;
    }

  private:
    static constexpr int kMost = 256, kOfProcessor = 65536;
    Schedule& schedule_;
    const int share_;
    const bool scarce_;
    int free_ = 0;
    Queue waiting_;

    std::string described(int count) const {
        return std::to_string(count) + " registers, having started with " + std::to_string(share_);
    }
};

}  // namespace model
}  // namespace device
}  // namespace attncap
