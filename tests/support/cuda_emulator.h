// Runs CUDA kernels on a CPU, as slowly as it takes: the blocks one after the other, the threads of a block as
// fibers that take turns at barriers and shuffles. What a test can see of a kernel without a GPU: its arithmetic,
// its indices, its barriers. Not its races between warps, nor its speed.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Dim3 { unsigned x, y, z; };
static Dim3 threadIdx, blockIdx, blockDim, gridDim;
alignas(16) static unsigned char emulated_shared[256 << 10];

struct alignas(8) Words2 { uint32_t x, y; };
struct alignas(16) Words4 { uint32_t x, y, z, w; };

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

namespace emulated {
enum State { READY, AT_WARP, AT_BLOCK, DONE };
struct Fiber {
    ucontext_t start;
    jmp_buf here;  // jumps between stacks: swapcontext would ask the kernel for the signal mask each time
    std::vector<char> stack = std::vector<char>(128 << 10);
    bool started = false;
    State state;
    uint32_t slot;
};
static std::vector<Fiber> fibers(1024);  // the most threads of a block
static jmp_buf scheduler;
static ucontext_t never;
static unsigned current;
static std::function<void()> body;

inline void yield(State state) {
    fibers[current].state = state;
    if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}
inline void enter() {
    for (;;) {  // a fiber lives on, from block to block
        body();
        yield(DONE);
    }
}
inline void resume(unsigned thread) {
    current = thread;
    threadIdx = {thread, 0, 0};
    Fiber& fiber = fibers[thread];
    fiber.state = READY;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    swapcontext(&never, &fiber.start);
}

// One block: each warp runs until all of its threads wait for the block, then the next; then all again.
inline void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) {
        if (!fibers[i].started) {
            getcontext(&fibers[i].start);
            fibers[i].start.uc_stack.ss_sp = fibers[i].stack.data();
            fibers[i].start.uc_stack.ss_size = fibers[i].stack.size();
            fibers[i].start.uc_link = nullptr;
            makecontext(&fibers[i].start, enter, 0);
        }
        fibers[i].state = READY;
    }
    bool running = true;
    while (running) {
        running = false;
        for (unsigned warp = 0; warp < threads; warp += 32) {
            bool waits = true;
            while (waits) {
                waits = false;
                for (unsigned i = warp; i < warp + 32 && i < threads; ++i)
                    if (fibers[i].state == READY || fibers[i].state == AT_WARP) {
                        resume(i);
                        waits |= fibers[i].state == AT_WARP;
                    }
            }
            for (unsigned i = warp; i < warp + 32 && i < threads; ++i) running |= fibers[i].state != DONE;
        }
        for (unsigned i = 0; i < threads; ++i)
            if (fibers[i].state == AT_BLOCK) fibers[i].state = READY;
    }
}

inline float half(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023, out;
    if (exponent == 31) out = sign | 0x7f800000 | mantissa << 13;
    else if (exponent) out = sign | (exponent + 112) << 23 | mantissa << 13;
    else {
        float value = std::ldexp((float)mantissa, -24);
        return sign ? -value : value;
    }
    return __uint_as_float(out);
}
inline uint16_t bits_of(float value) {
    uint16_t sign = __float_as_uint(value) >> 16 & 0x8000;
    float size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 6.103515625e-05f) return sign | (uint16_t)std::nearbyint(std::ldexp(size, 24));
    int exponent;
    std::frexp(size, &exponent);
    int mantissa = (int)std::nearbyint(std::ldexp(size, 11 - exponent));  // 1024 to 2048, ties to even
    return sign | (uint16_t)((exponent + 13) * 1024 + mantissa);
}
template <typename F> uint32_t by_half(F of) { return bits_of(of(0)) | (uint32_t)bits_of(of(16)) << 16; }
inline float part(uint32_t two, int shift) { return half((uint16_t)(two >> shift)); }
}  // namespace emulated

inline float widen(uint16_t bits) { return emulated::half(bits); }
inline uint16_t narrow(float value) { return emulated::bits_of(value); }
inline uint32_t narrow2(float low, float high) { return narrow(low) | (uint32_t)narrow(high) << 16; }
struct alignas(16) Floats4 { float x, y, z, w; };
inline Floats4 load_shared4(const float* at) { return *(const Floats4*)at; }
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    using emulated::part;
    return emulated::by_half([&](int s) { return part(a, s) * part(b, s) + part(c, s); });
}
inline uint32_t add2(uint32_t a, uint32_t b) {
    using emulated::part;
    return emulated::by_half([&](int s) { return part(a, s) + part(b, s); });
}
inline uint32_t mul2(uint32_t a, uint32_t b) {
    using emulated::part;
    return emulated::by_half([&](int s) { return part(a, s) * part(b, s); });
}
inline Words2 load_weights(const unsigned char* at) {
    Words2 words;
    std::memcpy(&words, at, sizeof words);
    return words;
}
inline void wait_for_previous() {}
inline void let_next_start() {}
inline void __syncthreads() { emulated::yield(emulated::AT_BLOCK); }
inline void __threadfence() {}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == 4);
    std::memcpy(&emulated::fibers[emulated::current].slot, &value, 4);
    unsigned other = emulated::current ^ mask;
    emulated::yield(emulated::AT_WARP);  // all have written
    std::memcpy(&value, &emulated::fibers[other].slot, 4);
    emulated::yield(emulated::AT_WARP);  // all have read
    return value;
}
template <typename T> T atomicAdd(T* at, T value) {
    T before = *at;
    *at += value;
    return before;
}
template <typename T> T __ldcg(const T* at) { return *at; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <typename... A>
void launch(void (*kernel)(A...), const unsigned* grid, unsigned threads, void** arguments) {
    emulated::body = [=] { call(kernel, arguments, std::index_sequence_for<A...>{}); };
    blockDim = {threads, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                std::memset(emulated_shared, 0xff, sizeof emulated_shared);  // not numbers
                emulated::run_block(threads);
            }
}
