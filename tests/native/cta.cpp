// What the model of a CTA must not let pass: waits that are missing, wrong or in vain, and memory that is not a
// kernel's.
#include <cmath>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.h"

namespace attncap {
namespace device {
namespace {

struct Body {
    const std::function<void()>* run;
};

ATTNCAP_KERNEL(1024, 1) call(ATTNCAP_PARAM Body body) { (*body.run)(); }

// What is wrong with a kernel of one block; nothing where it ran to its end.
std::string fault(int threads, int shared_bytes, const std::function<void()>& body, int seed = 1) {
    model::seed() = uint64_t(seed);
    try {
        launch(call, 1, threads, shared_bytes, nullptr, "kernel", Body{&body});
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

void passes(const char* what, int threads, int shared_bytes, const std::function<void()>& body) {
    for (int seed = 0; seed < 20; ++seed)
        check::that(fault(threads, shared_bytes, body, seed).empty(), what, {double(seed)});
}

void throws(const char* what, const char* text, int threads, int shared_bytes, const std::function<void()>& body) {
    for (int seed = 0; seed < 20; ++seed) {
        check::that(fault(threads, shared_bytes, body, seed).find(text) != std::string::npos, what, {double(seed)});
    }
}

uint64_t* barrier(int i = 0) { return shared_memory<uint64_t>() + i; }

void check_mbarriers() {
    passes("a phase ends with its last arrival", 32, 64, [] {
        if (thread() == 0) barrier_init(barrier(), 32);
        sync_block();
        barrier_wait(barrier(), 1);
        for (int phase = 0; phase < 5; ++phase) {
            barrier_arrive(barrier());
            barrier_wait(barrier(), phase % 2);
        }
    });
    throws("an arrival is missing", "threads 0-30 wait for the mbarrier at byte 8, phase of parity 0: 1 of 31 arrivals",
           32, 64, [] {
               if (thread() == 0) barrier_init(barrier(1), 31);
               sync_block();
               if (thread() < 30) barrier_arrive(barrier(1));
               if (thread() < 31) barrier_wait(barrier(1), 0);
           });
    throws("the parity is wrong", "deadlock", 32, 64, [] {
        if (thread() == 0) barrier_init(barrier(), 32);
        sync_block();
        barrier_arrive(barrier());
        barrier_wait(barrier(), 0);
        if (thread() == 7) barrier_wait(barrier(), 1);
    });
    throws("bytes are missing", "0 of 1 arrivals and 64 bytes are missing", 32, 64, [] {
        if (thread() > 0) return;
        barrier_init(barrier(), 1);
        barrier_expect(barrier(), 64);
        barrier_wait(barrier(), 0);
    });
    throws("more arrivals than it counts", "more arrivals than it counts", 32, 64, [] {
        if (thread() > 0) return;
        barrier_init(barrier(), 1);
        barrier_expect(barrier(), 64);
        barrier_arrive(barrier());
    });
    throws("never initialised", "not initialised", 32, 64, [] { barrier_arrive(barrier()); });
    throws("overwritten", "overwritten", 32, 64, [] {
        if (thread() == 0) barrier_init(barrier(), 1);
        sync_block();
        if (thread() == 0) *shared_memory<float>() = 1;
        sync_block();
        barrier_wait(barrier(), 1);
    });
    throws("initialised twice", "initialised twice", 32, 64, [] { barrier_init(barrier(), 1); });
    throws("outside of shared memory", "do not lie in the 64 bytes", 32, 64, [] { barrier_init(barrier(8), 1); });
    throws("not aligned", "not aligned", 32, 64,
           [] { barrier_init(reinterpret_cast<uint64_t*>(shared_memory<char>() + 4), 1); });
}

void check_named_barriers() {
    passes("one half arrives, the other waits", 128, 8, [] {
        if (thread() < 64) {
            if (thread() == 5) *shared_memory<int>() = 12;
            named_arrive(3, 128);
        } else {
            named_sync(3, 128);
            if (*shared_memory<int>() != 12) throw model::Fault("too early");
        }
    });
    passes("two halves take turns", 64, 8, [] {
        const int half = thread() / 32;
        if (half == 1) named_arrive(1, 64);
        for (int turn = 0; turn < 6; ++turn) {
            named_sync(1 + half, 64);
            int* last = shared_memory<int>();
            if (turn + half > 0 && *last != 1 - half) throw model::Fault("out of turn");
            sync_warp();
            *last = half;
            named_arrive(2 - half, 64);
        }
    });
    throws("threads are missing", "named barrier 2: 32 of 64 threads are there", 64, 0, [] {
        if (thread() < 32) named_sync(2, 64);
    });
    throws("different numbers of threads", "threads at once", 96, 0, [] { named_sync(2, thread() < 50 ? 64 : 96); });
    throws("a thread arrives twice", "arrives twice", 64, 0, [] {
        if (thread() < 32) named_arrive(1, 64);
        if (thread() < 32) named_arrive(1, 64);
    });
    throws("halves of two warps", "a part of a warp is there", 64, 0, [] {
        if (thread() % 32 < 16) named_sync(1, 32);
    });
    throws("part of a warp", "no named barrier 1 for 40 threads", 64, 0, [] { named_sync(1, 40); });
    throws("no such barrier", "no named barrier 16", 64, 0, [] { named_sync(16, 64); });
    throws("a thread has gone", "sync_block: 63 of 64", 64, 0, [] {
        if (thread() != 9) sync_block();
    });
}

void check_warps() {
    throws("lanes part", "lanes of a warp part", 32, 0, [] {
        if (thread() == 3) {
            any(true);
        } else {
            reduce_max(1);
        }
    });
    throws("a lane is missing", "threads 0-2, 4-31 wait for reduce_max: 31 of 32 lanes are there", 32, 0, [] {
        if (thread() != 3) reduce_max(1);
    });
    passes("warps go their own ways", 96, 0, [] {
        for (int i = 0; i < 1 + thread() / 32; ++i) any(true);
    });
}

void check_registers() {
    passes("what one releases others claim", 384, 0, [] {
        if (thread() < 128) {
            release_registers<24>();
        } else {
            claim_registers<240>();
        }
    });
    throws("too few are released", "240 registers, having started with 168", 384, 0, [] {
        if (thread() < 128) {
            release_registers<40>();
        } else {
            claim_registers<240>();
        }
    });
    throws("releases what it has not", "releases to 240 registers", 384, 0, [] { release_registers<240>(); });
    throws("claims what it has", "claims 160 registers", 384, 0, [] { claim_registers<160>(); });
}

void check_memory() {
    passes("it starts as NaNs", 32, 64, [] {
        const uint16_t number = *shared_memory<uint16_t>();
        const bool nan = std::isnan(*shared_memory<float>()) && std::isnan(*shared_memory<double>()) &&
                         std::isnan(model::widened<BFloat16>(number)) && std::isnan(model::widened<Float16>(number));
        if (!nan) throw model::Fault("a number");
        if (reinterpret_cast<uintptr_t>(shared_memory<char>()) % 1024 != 0) throw model::Fault("not aligned");
    });
    throws("written before its start", "written 4 bytes before its start", 32, 64,
           [] { shared_memory<float>()[-1] = 1; });
    throws("written after its end", "written 0 bytes after its end", 32, 64, [] { shared_memory<float>()[16] = 1; });
    throws("copied past its end", "copy_async: bytes 56 to 72", 32, 64,
           [] { copy_async(shared_memory<char>() + 56, nullptr, false); });
    throws("too many threads", "invalid configuration", 1056, 0, [] {});
    throws("part of a warp", "invalid configuration", 40, 0, [] {});
    throws("too much of it", "invalid configuration", 32, 227 * 1024 + 1, [] {});
    bool refused = false;
    try {
        thread();
    } catch (const model::Fault&) {
        refused = true;
    }
    check::that(refused, "a function of the device outside of a kernel");
}

void check_tensor_maps() {
    alignas(16) static const uint16_t numbers[64] = {};
    const auto refuses = [](const char* what, const void* base, const int64_t (&size)[4], const int64_t (&stride)[3],
                            int rows) {
        try {
            tensor_map(base, size, stride, rows, true);
            check::that(false, what);
        } catch (const std::invalid_argument&) {
            check::that(true, what);
        }
    };
    const int64_t size[4] = {64, 2, 2, 1}, stride[3] = {128, 256, 0};
    tensor_map(numbers, size, stride, 64, true);
    refuses("base", reinterpret_cast<const char*>(numbers) + 8, size, stride, 64);
    refuses("too many rows", numbers, size, stride, 257);
    refuses("no rows", numbers, size, stride, 0);
    refuses("an empty dimension", numbers, {64, 0, 2, 1}, stride, 64);
    refuses("a stride of 8 bytes", numbers, size, {8, 256, 0}, 64);
    refuses("a stride of zero", numbers, size, {0, 256, 0}, 64);
    refuses("a negative stride", numbers, size, {128, -256, 0}, 64);
    refuses("a huge stride", numbers, size, {128, int64_t(1) << 40, 0}, 64);
}

// A [64][64 steps] and B [64][64 steps] of ones: every element of A B^T is the number of columns.
struct Ones {
    static constexpr int kSteps = 6, kColumns = 64 * kSteps;
    std::vector<uint16_t> memory;
    TensorMap map;

    Ones() : memory(64 * kColumns, 0x3f80) {
        const int64_t size[4] = {kColumns, 64, 1, 1}, stride[3] = {kColumns * 2, 0, 0};
        map = tensor_map(memory.data(), size, stride, 64, true);
    }
};

enum class Mistake {
    none,
    no_wait_for_tiles,
    no_wait_for_room,
    room_before_products_are_done,
    phase,
    no_products_wait,
    bytes,
    accumulates_from_nothing,
};

constexpr int kTile = 64 * kRowBytes;

// The producer's part of a pipeline of two stages.
void produce(const Ones& ones, Mistake mistake, uint64_t* full, uint64_t* empty) {
    for (int i = 0; i < Ones::kSteps; ++i) {
        char* stage = shared_memory<char>() + i % 2 * 2 * kTile;
        if (mistake != Mistake::no_wait_for_room) barrier_wait(empty + i % 2, (i / 2 + 1) & 1);
        barrier_expect(full + i % 2, mistake == Mistake::bytes ? kTile : 2 * kTile);
        load_tile(&ones.map, full + i % 2, stage, 64 * i, 0, 0, 0);
        load_tile(&ones.map, full + i % 2, stage + kTile, 64 * i, 0, 0, 0);
    }
}

// The consumer's part; true where every accumulator is right.
bool consume(Mistake mistake, uint64_t* full, uint64_t* empty) {
    float acc[32];
    for (int i = 0; i < Ones::kSteps; ++i) {
        const char* stage = shared_memory<char>() + i % 2 * 2 * kTile;
        const int phase = mistake == Mistake::phase ? (i / 2 + 1) & 1 : i / 2 & 1;
        if (mistake != Mistake::no_wait_for_tiles) barrier_wait(full + i % 2, phase);
        multiply_fence();
        for (int k = 0; k < 4; ++k) {
            const bool add = i > 0 || k > 0 || mistake == Mistake::accumulates_from_nothing;
            multiply<BFloat16, 64>(acc, advance(k_major(stage), 32 * k), advance(k_major(stage + kTile), 32 * k), add);
        }
        multiply_commit();
        if (mistake == Mistake::room_before_products_are_done) barrier_arrive(empty + i % 2);
        if (mistake != Mistake::no_products_wait) multiply_wait<0>();
        if (mistake != Mistake::room_before_products_are_done) barrier_arrive(empty + i % 2);
    }
    bool right = true;
    for (float value : acc) right &= value == float(Ones::kColumns);
    multiply_wait<0>();
    return right;
}

// In how many of 40 orders a pipeline stops or gives wrong results.
int caught(Mistake mistake) {
    const Ones ones;
    int count = 0;
    for (int seed = 0; seed < 40; ++seed) {
        bool right = true;
        const std::string message = fault(
            256, 4 * kTile + 64,
            [&] {
                uint64_t* full = reinterpret_cast<uint64_t*>(shared_memory<char>() + 4 * kTile);
                uint64_t* empty = full + 2;
                if (thread() == 0) {
                    for (int i = 0; i < 2; ++i) {
                        barrier_init(full + i, 1);
                        barrier_init(empty + i, 128);
                    }
                    barrier_fence();
                }
                sync_block();
                if (thread() >= 128) {
                    right &= consume(mistake, full, empty);
                } else if (thread() == 0) {
                    produce(ones, mistake, full, empty);
                }
            },
            seed);
        count += !right || !message.empty();
    }
    return count;
}

void check_pipelines() {
    check::that(caught(Mistake::none) == 0, "a right pipeline passes in every order");
    const auto is_caught = [](const char* what, Mistake mistake, int least) {
        const int count = caught(mistake);
        check::that(count >= least, what, {double(count)});
        check::counts.note += " " + std::to_string(count);
    };
    is_caught("no wait for tiles", Mistake::no_wait_for_tiles, 10);
    is_caught("no wait for room", Mistake::no_wait_for_room, 10);
    is_caught("room is given before products are done", Mistake::room_before_products_are_done, 10);
    is_caught("the wrong phase", Mistake::phase, 10);
    is_caught("results are read before they are waited for", Mistake::no_products_wait, 40);
    is_caught("more bytes than expected", Mistake::bytes, 40);
    is_caught("accumulators were never set", Mistake::accumulates_from_nothing, 40);
}

// A tile of ones as A and as B.
void load_ones(const Ones& ones) {
    uint64_t* full = reinterpret_cast<uint64_t*>(shared_memory<char>() + kTile);
    if (thread() == 0) {
        barrier_init(full, 1);
        barrier_fence();
        barrier_expect(full, kTile);
        load_tile(&ones.map, full, shared_memory<char>(), 0, 0, 0, 0);
    }
    sync_block();
    barrier_wait(full, 0);
}

// 16 of K; each adds 16 to every accumulator.
void add_ones(float (&acc)[32]) {
    multiply_fence();
    multiply<BFloat16, 64>(acc, k_major(shared_memory<char>()), k_major(shared_memory<char>()), true);
    multiply_commit();
}

void check_products() {
    const Ones ones;
    const auto with_ones = [&](const std::function<void()>& body) {
        return [&ones, body] {
            load_ones(ones);
            body();
        };
    };
    const int bytes = kTile + 64;
    const auto expect = [](bool holds, const char* what) {
        if (!holds) throw model::Fault(what);
    };
    passes("a wait lets younger groups go on", 128, bytes, with_ones([&] {
               float older[32] = {}, younger[32] = {};
               add_ones(older);
               add_ones(younger);
               multiply_wait<1>();
               expect(older[31] == 16, "the older group is done");
               expect(std::isnan(younger[31]), "the younger one is not");
               multiply_wait<0>();
               expect(younger[31] == 16, "now it is");
           }));
    passes("multiplications into the same accumulators follow each other", 128, bytes, with_ones([&] {
               float acc[32] = {};
               for (int i = 0; i < 5; ++i) add_ones(acc);
               multiply_wait<1>();
               expect(std::isnan(acc[0]), "under way");
               multiply_wait<0>();
               expect(acc[0] == 80, "five times 16");
               add_ones(acc);
               multiply_wait<0>();
               expect(acc[0] == 96, "and a sixth");
           }));
    throws("accumulators are scaled under way", "scaling is lost", 128, bytes, with_ones([&] {
               float acc[32] = {};
               add_ones(acc);
               for (float& value : acc) value *= 2;
               multiply_wait<0>();
               expect(acc[0] == 32, "scaling is lost");
           }));
    throws("no fence", "no multiply_fence", 128, bytes, with_ones([&] {
               float acc[32] = {};
               multiply<BFloat16, 64>(acc, k_major(shared_memory<char>()), k_major(shared_memory<char>()), false);
           }));
    throws("no wait", "has not waited for its products", 128, bytes, with_ones([&] {
               float acc[32] = {};
               add_ones(acc);
           }));
    throws("not all threads take part", "a multiplication that 127 of 128 threads have issued", 128, bytes,
           with_ones([&] {
               float acc[32] = {};
               if (thread() != 77) add_ones(acc);
               multiply_wait<0>();
           }));
    throws("threads disagree", "say different things", 128, bytes, with_ones([&] {
               float acc[32] = {};
               multiply_fence();
               const uint64_t a = k_major(shared_memory<char>());
               multiply<BFloat16, 64>(acc, a, advance(a, thread() == 100 ? 32 : 0), false);
               multiply_commit();
               multiply_wait<0>();
           }));
    throws("no swizzle", "without the 128-byte swizzle", 128, bytes, with_ones([&] {
               float acc[32] = {};
               multiply_fence();
               const uint64_t a = k_major(shared_memory<char>());
               multiply<BFloat16, 64>(acc, a, a & ~kSwizzle128, false);
               multiply_commit();
               multiply_wait<0>();
           }));
    throws("outside of shared memory", "multiply: bytes", 128, bytes, with_ones([&] {
               float acc[32] = {};
               multiply_fence();
               const uint64_t a = k_major(shared_memory<char>());
               multiply<BFloat16, 64>(acc, a, advance(a, kTile), false);
               multiply_commit();
               multiply_wait<0>();
           }));
    throws("a panel that is not aligned", "multiple of 1024 bytes", 128, bytes, [&] {
        if (thread() > 0) return;
        barrier_init(reinterpret_cast<uint64_t*>(shared_memory<char>()), 1);
        barrier_fence();
        load_tile(&ones.map, reinterpret_cast<uint64_t*>(shared_memory<char>()), shared_memory<char>() + 64, 0, 0, 0,
                  0);
    });
    throws("TMA does not know of the mbarrier", "no barrier_fence", 128, bytes, [&] {
        if (thread() != 0) return;
        barrier_init(reinterpret_cast<uint64_t*>(shared_memory<char>() + kTile), 1);
        load_tile(&ones.map, reinterpret_cast<uint64_t*>(shared_memory<char>() + kTile), shared_memory<char>(), 0, 0, 0,
                  0);
    });
    int late = 0;
    for (int seed = 0; seed < 20; ++seed) {
        const std::string message = fault(
            128, bytes,
            [&] {
                uint64_t* full = reinterpret_cast<uint64_t*>(shared_memory<char>() + kTile);
                if (thread() != 0) return;
                barrier_init(full, 1);
                barrier_fence();
                barrier_expect(full, kTile);
                load_tile(&ones.map, full, shared_memory<char>(), 0, 0, 0, 0);
            },
            seed);
        late += message.find("the block ends while tiles are under way") != std::string::npos;
    }
    check::that(late >= 5, "a tile is under way at the end", {double(late)});
}

// In how many of 40 orders the registers of A, overwritten before or after the wait, give a wrong result.
int wrong_registers(bool early) {
    const Ones ones;
    int count = 0;
    for (int seed = 0; seed < 40; ++seed) {
        bool right = true;
        const std::string message = fault(
            128, kTile + 64,
            [&] {
                load_ones(ones);
                float acc[32];
                uint32_t a[4];
                for (uint32_t& pair : a) pair = pack<BFloat16>(1, 1);
                multiply_fence();
                multiply<BFloat16, 64>(acc, a, mn_major(shared_memory<char>(), kTile), false);
                multiply_commit();
                if (!early) multiply_wait<0>();
                for (uint32_t& pair : a) pair = pack<BFloat16>(2, 2);
                if (early) multiply_wait<0>();
                for (float value : acc) right &= value == 16;
            },
            seed);
        check::that(message.empty(), "it runs");
        count += !right;
    }
    return count;
}

void check_registers_of_products() {
    check::that(wrong_registers(false) == 0, "after the wait they may be written");
    check::that(wrong_registers(true) >= 10, "before it they may not");
}

// In how many of 40 orders what is copied is not there where it is read.
int missing_chunks(bool waits, bool last_only, bool syncs) {
    alignas(16) static const float numbers[4] = {1, 2, 3, 4};
    int count = 0;
    for (int seed = 0; seed < 40; ++seed) {
        bool right = true;
        fault(
            64, 2048,
            [&] {
                float* first = shared_memory<float>();
                copy_async(first + 4 * thread(), numbers, true);
                copy_commit();
                copy_async(first + 256 + 4 * thread(), numbers, true);
                copy_commit();
                if (waits && last_only) copy_wait<1>();
                if (waits && !last_only) copy_wait<0>();
                if (syncs) sync_block();
                right &= first[4 * (63 - thread())] == 1 && (last_only || first[256 + 4 * (63 - thread())] == 1);
                copy_wait<0>();
            },
            seed);
        count += !right;
    }
    return count;
}

void check_copies() {
    check::that(missing_chunks(true, false, true) == 0, "waited for and synchronised");
    check::that(missing_chunks(true, true, true) == 0, "the older group alone");
    check::that(missing_chunks(false, false, true) >= 10, "not waited for");
    check::that(missing_chunks(true, false, false) >= 10, "not synchronised");
}

std::vector<int> order_of_threads(int seed) {
    std::vector<int> order;
    fault(
        128, 64,
        [&] {
            order.push_back(thread());
            sync_block();
            order.push_back(thread());
        },
        seed);
    return order;
}

void check_order() {
    std::set<std::vector<int>> orders;
    for (int seed = 0; seed < 10; ++seed) {
        check::that(order_of_threads(seed) == order_of_threads(seed), "a seed repeats its order", {double(seed)});
        orders.insert(order_of_threads(seed));
    }
    check::that(orders.size() == 10, "seeds differ", {double(orders.size())});
    std::vector<int> seen;
    const std::function<void()> note = [&] {
        if (thread() == 0) seen.push_back(block());
        if (blocks() != 50) throw model::Fault("number of blocks");
    };
    launch(call, 50, 32, 0, nullptr, "kernel", Body{&note});
    check::that(std::set<int>(seen.begin(), seen.end()).size() == 50 && seen.size() == 50, "each block once");
    check::that(!std::is_sorted(seen.begin(), seen.end()), "blocks in any order");
    const std::function<void()> fails = [] {
        if (block() == 4 && thread() == 9) throw std::logic_error("of a kernel's own");
        sync_block();
    };
    try {
        launch(call, 6, 64, 0, nullptr, "kernel", Body{&fails});
        check::that(false, "an exception leaves the kernel");
    } catch (const std::logic_error& error) {
        check::that(error.what() == std::string("of a kernel's own"), "as it was thrown");
    }
    passes("and the next kernel runs", 1024, 0, [] { sync_block(); });
}

int run_all() {
    check::group("mbarriers", check_mbarriers);
    check::group("named_barriers", check_named_barriers);
    check::group("warps", check_warps);
    check::group("registers", check_registers);
    check::group("memory", check_memory);
    check::group("tensor_maps", check_tensor_maps);
    check::group("pipelines", check_pipelines);
    check::group("products", check_products);
    check::group("registers_of_products", check_registers_of_products);
    check::group("copies", check_copies);
    check::group("order", check_order);
    return 0;
}

}  // namespace
}  // namespace device
}  // namespace attncap

int main() { return attncap::device::run_all(); }
