// The threads of a CTA, run one at a time in an order that a seed draws, and the hardware that works beside them.
#pragma once

#include <algorithm>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model/fiber.h"
#include "model/random.h"

namespace attncap {
namespace device {
namespace model {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

// What a kernel does wrong and the model sees.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A part of the hardware that works on its own: asked now and then to do one of the things it was given.
class Engine {
  public:
    virtual ~Engine() = default;
    // False where nothing is to be done.
    virtual bool step(Random* random) = 0;
};

// Threads that wait for the same thing.
using Queue = std::vector<int>;

class Schedule {
  public:
    Schedule(int threads, uint64_t seed, std::function<void()> body)
        : random(seed), body_(std::move(body)), threads_(size_t(threads)), runnable_(size_t(threads / kWarp)) {
        draw_habits();
        while (stacks().size() < threads_.size()) stacks().push_back(std::make_unique<Stack>(stacks().size()));
        for (int i = 0; i < threads; ++i) {
            threads_[size_t(i)].context.prepare(*stacks()[size_t(i)], enter);
            make_runnable(i);
        }
    }

    void add(Engine* engine) { engines_.push_back(engine); }

    // Runs every thread to its end; throws what one of them threw, or that none can go on.
    void run() {
        entering() = this;
        for (size_t left = threads_.size(); left > 0;) {
            let_engines_work();
            const int warp = choose_warp();
            if (warp < 0) {
                if (!one_engine_step()) throw Fault(deadlock());
                continue;
            }
            current_ = take_lane(warp);
            Thread& thread = threads_[size_t(current_)];
            scheduler_.switch_to(&thread.context);
            if (error_) std::rethrow_exception(error_);
            left -= thread.done;
        }
    }

    int current() const { return current_; }
    int threads() const { return int(threads_.size()); }

    // Now and then another thread's turn.
    void pause() {
        if (!random.one_in(yields_one_in_)) return;
        make_runnable(current_);
        leave();
    }

    // Returns once `holds`; others must wake the queue when they have made it so. `what` says what is waited for.
    template <class Holds, class What>
    void wait_until(Queue* queue, const Holds& holds, const What& what) {
        while (!holds()) {
            Thread& thread = threads_[size_t(current_)];
            thread.waits_for = [&what] { return std::string(what()); };
            queue->push_back(current_);
            leave();
            thread.waits_for = nullptr;
        }
    }

    void wake(Queue* queue) {
        for (int thread : *queue) make_runnable(thread);
        queue->clear();
    }

    Random random;

  private:
    struct Thread {
        Context context;
        std::function<std::string()> waits_for;
        bool done = false;
    };
    static constexpr int kNever = 0;

    const std::function<void()> body_;
    std::vector<Thread> threads_;
    std::vector<std::vector<int>> runnable_;  // of each warp
    std::vector<uint64_t> priority_;          // of each warp, where some run ahead of others
    std::vector<Engine*> engines_;
    Context scheduler_;
    std::exception_ptr error_;
    int current_ = -1;
    int engine_step_one_in_ = kNever, yields_one_in_ = 1;

    static std::vector<std::unique_ptr<Stack>>& stacks() {
        static thread_local std::vector<std::unique_ptr<Stack>> all;
        return all;
    }

    static Schedule*& entering() {
        static thread_local Schedule* schedule = nullptr;
        return schedule;
    }

    // Errors hide in different habits: engines that are always done at once or never before they must, warps that run
    // far ahead of others or all side by side.
    void draw_habits() {
        constexpr int kEngines[] = {kNever, 1, 4, 64}, kYields[] = {1, 4, 32};
        engine_step_one_in_ = kEngines[random.below(4)];
        yields_one_in_ = kYields[random.below(3)];
        if (random.one_in(2)) priority_.resize(runnable_.size());
        draw_priorities();
    }

    void draw_priorities() {
        for (uint64_t& each : priority_) each = random.next();
    }

    void let_engines_work() {
        if (engine_step_one_in_ == kNever || !random.one_in(engine_step_one_in_)) return;
        while (one_engine_step() && engine_step_one_in_ == 1) continue;
    }

    bool one_engine_step() {
        const int count = int(engines_.size()), first = count > 0 ? random.below(count) : 0;
        for (int i = 0; i < count; ++i) {
            if (engines_[size_t((first + i) % count)]->step(&random)) return true;
        }
        return false;
    }

    // A warp with a thread that can run, or -1.
    int choose_warp() {
        const int warps = int(runnable_.size());
        constexpr int kTurnsOfAnOrder = 512;
        if (random.one_in(kTurnsOfAnOrder)) draw_priorities();
        int chosen = -1;
        const int first = random.below(warps);
        for (int i = 0; i < warps; ++i) {
            const int warp = (first + i) % warps;
            if (runnable_[size_t(warp)].empty()) continue;
            if (priority_.empty()) return warp;
            if (chosen < 0 || priority_[size_t(warp)] > priority_[size_t(chosen)]) chosen = warp;
        }
        return chosen;
    }

    int take_lane(int warp) {
        std::vector<int>& lanes = runnable_[size_t(warp)];
        std::swap(lanes[size_t(random.below(int(lanes.size())))], lanes.back());
        const int taken = lanes.back();
        lanes.pop_back();
        return taken;
    }

    void make_runnable(int thread) { runnable_[size_t(thread / kWarp)].push_back(thread); }

    void leave() {
        Thread& thread = threads_[size_t(current_)];
        thread.context.switch_to(&scheduler_, thread.done);
    }

    // The start of every thread's stack.
    static void enter() {
        Schedule& schedule = *entering();
        Thread& thread = schedule.threads_[size_t(schedule.current_)];
        thread.context.entered(&schedule.scheduler_);
        try {
            schedule.body_();
        } catch (...) {
            schedule.error_ = std::current_exception();
        }
        thread.done = true;
        schedule.leave();
    }

    std::string deadlock() const {
        std::map<std::string, std::vector<int>> waits;
        for (int i = 0; i < threads(); ++i) {
            if (threads_[size_t(i)].waits_for) waits[threads_[size_t(i)].waits_for()].push_back(i);
        }
        std::string text = "deadlock:";
        for (const auto& [what, who] : waits) text += "\n    threads " + ranges(who) + " wait for " + what;
        return text;
    }

    // 0-3, 7
    static std::string ranges(const std::vector<int>& numbers) {
        std::string text;
        for (size_t i = 0, end; i < numbers.size(); i = end) {
            for (end = i + 1; end < numbers.size() && numbers[end] == numbers[end - 1] + 1;) ++end;
            text += (i > 0 ? ", " : "") + std::to_string(numbers[i]);
            if (end > i + 1) text += "-" + std::to_string(numbers[end - 1]);
        }
        return text;
    }
};

}  // namespace model
}  // namespace device
}  // namespace attncap
