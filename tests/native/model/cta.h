// A CTA: its threads, its shared memory and the hardware that serves them.
#pragma once

#include <functional>
#include <utility>

#include "model/barriers.h"
#include "model/copies.h"
#include "model/memory.h"
#include "model/products.h"
#include "model/schedule.h"
#include "model/warp.h"

namespace attncap {
namespace device {
namespace model {

struct Launch {
    int blocks, threads, shared_bytes;
};

class Cta {
  public:
    Cta(const Launch& launch, int block, uint64_t seed, std::function<void()> body)
        : launch(launch),
          block(block),
          schedule(launch.threads, seed,
                   [this, body = std::move(body)] {
                       body();
                       products.check_thread_done();
                   }),
          memory(launch.shared_bytes),
          barriers(&schedule, &memory),
          tiles(&schedule, &memory, &barriers),
          copies(&schedule, &memory),
          products(&schedule, &memory),
          warps(&schedule),
          registers(&schedule) {
        for (Engine* engine :
             {static_cast<Engine*>(&tiles), static_cast<Engine*>(&copies), static_cast<Engine*>(&products)}) {
            schedule.add(engine);
        }
    }

    void run() {
        Cta* const outer = std::exchange(current_, this);
        try {
            schedule.run();
            tiles.check_done();
            memory.check_fences();
        } catch (...) {
            current_ = outer;
            throw;
        }
        current_ = outer;
    }

    // The one whose thread is running.
    static Cta& current() {
        if (!current_) throw Fault("a function of the device is called outside of a kernel");
        return *current_;
    }

    const Launch launch;
    const int block;
    Schedule schedule;
    Memory memory;
    Barriers barriers;
    TileLoads tiles;
    ChunkCopies copies;
    Products products;
    Warps warps;
    Registers registers;

  private:
    static inline thread_local Cta* current_ = nullptr;
};

}  // namespace model
}  // namespace device
}  // namespace attncap
