// The kernels of one decode step: a single row through a Gemma 4 text model, 250 launches for E2B.
//
// A step is bound by the weights' bytes and by the number of kernels, so that everything between two products is
// part of a product: the norm before it (each block computes it, it is a few kilobytes), the residual sum, the
// activation and the gate after it. Compiled by NVRTC for the GPU at hand; tests/support/cuda_emulator.h runs the
// same text on a CPU.
//
// Weights are those of ONNX Runtime's MatMulNBits: rows of blocks, the low bits first, zero point 2^(bits-1), one
// scale a block. Activations between kernels are float32. Inside a product they are float16, times a power of two
// that puts the largest into [128, 256), so that none can overflow; sums are float32.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
#ifdef EMULATED
#define DYNAMIC_SHARED(name) unsigned char* name = emulated_shared
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };
struct alignas(16) Floats4 { float x, y, z, w; };

__device__ inline float widen(u16 half) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
    return result;
}
__device__ inline u16 narrow(float value) {
    u16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}
__device__ inline u32 narrow2(float low, float high) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
__device__ inline u32 fma2(u32 a, u32 b, u32 c) {  // of two float16
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
__device__ inline u32 add2(u32 a, u32 b) {
    u32 result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
__device__ inline u32 mul2(u32 a, u32 b) {
    u32 result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
__device__ inline Words2 load_weights(const unsigned char* at) {  // read once: not kept in the first cache
    Words2 result;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(result.x), "=r"(result.y) : "l"(at));
    return result;
}
__device__ inline Floats4 load_shared4(const float* at) {  // written by other blocks
    Floats4 result;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(result.x), "=f"(result.y), "=f"(result.z), "=f"(result.w) : "l"(at) : "memory");
    return result;
}
// A kernel may start before the one before it has ended (programmatic dependent launch), read weights, and wait.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
#endif

constexpr int WARP = 32;
constexpr u32 ALL = 0xffffffffu;
constexpr float LOWEST = -3.0e38f;

__device__ inline float warp_sum(float value) {
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(ALL, value, offset);
    return value;
}
__device__ inline float warp_max(float value) {
    for (int offset = 16; offset; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(ALL, value, offset));
    return value;
}

// Sum of `value` over the block, and maximum of `other`. place: 64 floats of shared memory, used once.
__device__ inline void block_reduce(float& value, float& other, float* place) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    value = warp_sum(value);
    other = warp_max(other);
    if (lane == 0) {
        place[warp] = value;
        place[32 + warp] = other;
    }
    __syncthreads();
    value = warp_sum(lane < warps ? place[lane] : 0.0f);
    other = warp_max(lane < warps ? place[32 + lane] : 0.0f);
}

__device__ inline float dot4(Floats4 a, Floats4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ inline Floats4 times4(Floats4 a, Floats4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }

__device__ inline float activate(float x, int kind) {
    switch (kind) {
        case 0: return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));  // gelu, tanh
        case 1: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));                              // gelu
        case 2: return x / (1.0f + expf(-x));                                                          // silu
        default: return fmaxf(x, 0.0f);                                                                // relu
    }
}

// ---------------------------------------------------------------------------------------------------- products

// How activations lie in shared memory: as the lanes of a warp read them, 16 bytes at a time without conflicts.
// A lane takes 8 bytes of a row at each of its turns: 32, 16 or 8 weights. A thread puts down 8 activations at a
// time, two fours of a row that are unpacked as pairs: a word's nibbles i and i + 4, or its crumbs i and i + 8.
template <int BITS> struct Layout {
    static constexpr int LANE = 64 / BITS;  // weights of a lane's turn
    static constexpr int TURN = LANE * WARP;
    static constexpr int PLANES = BITS == 2 ? 4 : 2;  // 16-byte reads of a lane's turn
    static constexpr int APART = BITS == 2 ? 8 : 4;   // of the two fours

    static __device__ inline int first(int eight) { return BITS == 2 ? eight / 2 * 16 + eight % 2 * 4 : eight * 8; }

    static __device__ inline void store(unsigned char* shared, int eight, Floats4 a, Floats4 b) {
        int lane = first(eight) / LANE, plane = BITS == 8 ? 0 : eight % PLANES;
        int place = (lane / WARP * PLANES + plane) * WARP + lane % WARP;
        if (BITS == 8) {
            ((Floats4*)shared)[place] = a;
            ((Floats4*)shared)[place + WARP] = b;
        } else {
            ((Words4*)shared)[place] = Words4{narrow2(a.x, b.x), narrow2(a.y, b.y), narrow2(a.z, b.z), narrow2(a.w, b.w)};
        }
    }
};

template <int BITS> struct Dot;

template <> struct Dot<4> {
    static __device__ inline float of(Words2 w, const unsigned char* shared, int turn, int lane) {
        const Words4* x = (const Words4*)shared + turn * 2 * WARP + lane;
        return word(w.x, x[0]) + word(w.y, x[WARP]);
    }
    static __device__ inline float word(u32 w, Words4 x) {
        // 0x6400 | n is 1024 + n in float16, and 0x6400 | n << 4 is 1024 + 16 n; the zero point is 8.
        u32 a = mul2(add2((w & 0x000f000fu) | 0x64006400u, 0xe408e408u), x.x);               // -1032
        a = fma2(fma2((w & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u), x.y, a);   // 1/16, -72
        w >>= 8;
        a = fma2(add2((w & 0x000f000fu) | 0x64006400u, 0xe408e408u), x.z, a);
        a = fma2(fma2((w & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u), x.w, a);
        return widen((u16)a) + widen((u16)(a >> 16));
    }
};

template <> struct Dot<2> {
    static __device__ inline float of(Words2 w, const unsigned char* shared, int turn, int lane) {
        const Words4* x = (const Words4*)shared + turn * 4 * WARP + lane;
        return word(w.x, x[0], x[WARP]) + word(w.y, x[2 * WARP], x[3 * WARP]);
    }
    static __device__ inline float word(u32 w, Words4 x, Words4 y) {
        u32 a = four(w, x, 0u);
        a = four(w >> 8, y, a);
        return widen((u16)a) + widen((u16)(a >> 16));
    }
    static __device__ inline u32 four(u32 w, Words4 x, u32 a) {  // 1024 + 4^i n, zero point 2
        a = fma2(add2((w & 0x00030003u) | 0x64006400u, 0xe402e402u), x.x, a);                // -1026
        a = fma2(fma2((w & 0x000c000cu) | 0x64006400u, 0x34003400u, 0xdc08dc08u), x.y, a);   // 1/4, -258
        a = fma2(fma2((w & 0x00300030u) | 0x64006400u, 0x2c002c00u, 0xd420d420u), x.z, a);   // 1/16, -66
        return fma2(fma2((w & 0x00c000c0u) | 0x64006400u, 0x24002400u, 0xcc80cc80u), x.w, a);  // 1/64, -18
    }
};

template <> struct Dot<8> {
    static __device__ inline float of(Words2 w, const unsigned char* shared, int turn, int lane) {
        const Words4* x = (const Words4*)shared + turn * 2 * WARP + lane;
        return word(w.x, x[0]) + word(w.y, x[WARP]);
    }
    static __device__ inline float word(u32 w, Words4 x) {
        // 0x4b000000 | n is 2^23 + n in float32; the zero point is 128.
        float sum = byte(w & 255u) * __uint_as_float(x.x);
        sum += byte(w >> 8 & 255u) * __uint_as_float(x.y);
        sum += byte(w >> 16 & 255u) * __uint_as_float(x.z);
        return sum + byte(w >> 24) * __uint_as_float(x.w);
    }
    static __device__ inline float byte(u32 n) { return __uint_as_float(0x4b000000u | n) - 8388736.0f; }
};

__device__ inline float scale_of(const float* scales, int at) { return scales[at]; }
__device__ inline float scale_of(const u16* scales, int at) { return widen(scales[at]); }

enum Result { STORE, GATED, TIMES, LOGITS };
enum Input { BARE = 0, BRANCH = 1, NORM = 2, BOUNDED = 4 };  // bits: see below; BOUNDED: at most 256

// y = W x. W: `rows` rows of `width` weights. One warp computes ROWS of them at a time; of a GATED product, whose
// result is activation(gate) * up, one row of each of two matrices. TURNS: of a row, read at once.
//
// x, in shared memory for the whole block, LOADS times 8 values from each thread:
//   hidden = (x + rms_norm(branch) * branch_weight) * scale   with BRANCH; else x
//   input = rms_norm(hidden) * weight                         with NORM; else hidden
// With BRANCH block 0 writes `hidden` to `updated`, which no block reads. WHOLE: a row is so many whole TURNS.
template <int BITS, typename Scale, int RESULT, int INPUT, int ROWS, int TURNS, int LOADS, bool WHOLE>
__global__ void __launch_bounds__(512, 2) product(
    const unsigned char* weights, const unsigned char* weights_up, const Scale* scales, const Scale* scales_up,
    int rows, int width, int row_bytes, int block_shift,
    const float* x, const float* branch, const float* branch_weight, const float* weight, float* updated,
    float branch_eps, float eps, float scale,
    float* out, const float* other, int activation, float softcap, float* best_value, int* best_row) {
    typedef Layout<BITS> L;
    DYNAMIC_SHARED(shared);
    __shared__ float places[3][64];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int turns = (row_bytes + 8 * WARP - 1) / (8 * WARP), parts = (turns + TURNS - 1) / TURNS;
    int step = gridDim.x * (blockDim.x / WARP), units = RESULT == GATED ? rows : rows / ROWS;
    int blocks = row_bytes * (8 / BITS) >> block_shift, turn_blocks = L::TURN >> block_shift;
    int unit = blockIdx.x * (blockDim.x / WARP) + warp, part = 0;

    // Where the warp's next weights and scales are.
    const unsigned char* w_at[ROWS];
    const Scale* s_at[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        bool up = RESULT == GATED && r == 1;
        i64 row = RESULT == GATED ? unit : (i64)unit * ROWS + r;
        w_at[r] = (up ? weights_up : weights) + row * row_bytes + lane * 8;
        s_at[r] = (up ? scales_up : scales) + row * blocks + (lane * L::LANE >> block_shift);
    }
    i64 w_step = (i64)(RESULT == GATED ? step : step * ROWS) * row_bytes;
    i64 s_step = (i64)(RESULT == GATED ? step : step * ROWS) * blocks;
    Words2 w[ROWS][TURNS], w_next[ROWS][TURNS];
    float s[ROWS][TURNS], s_next[ROWS][TURNS];
    auto load = [&](int part, Words2 (&w)[ROWS][TURNS], float (&s)[ROWS][TURNS]) {
        int turn = part * TURNS;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int t = 0; t < TURNS; ++t) {
                bool inside = WHOLE || ((turn + t) * WARP + lane) * 8 < row_bytes;
                w[r][t] = inside ? load_weights(w_at[r] + (turn + t) * 8 * WARP) : Words2{0, 0};
                s[r][t] = inside ? scale_of(s_at[r], (turn + t) * turn_blocks) : 0.0f;
            }
    };
    if (unit < units) load(0, w, s);

    // The input, with a power of two taken out.
    Floats4 h[LOADS][2], b[LOADS][2], branch_by[LOADS][2], by[LOADS][2];
    float largest = 0.0f, sum = 0.0f, none = 0.0f;
    auto read = [&](const float* from, Floats4 (&to)[LOADS][2], bool wanted, float otherwise) {
#pragma unroll
        for (int j = 0; j < LOADS; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int k = L::first(j * blockDim.x + threadIdx.x) + i * L::APART;
                to[j][i] = wanted && k < width ? *(const Floats4*)(from + k)
                                               : Floats4{otherwise, otherwise, otherwise, otherwise};
            }
    };
    read(branch_weight, branch_by, INPUT & BRANCH, 0.0f);
    read(weight, by, INPUT & NORM, 1.0f);
    wait_for_previous();
    let_next_start();
    read(x, h, true, 0.0f);
    read(branch, b, INPUT & BRANCH, 0.0f);
    if (INPUT & BRANCH) {
#pragma unroll
        for (int j = 0; j < LOADS; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) sum += dot4(b[j][i], b[j][i]);
        block_reduce(sum, none, places[0]);
        float rms = rsqrtf(sum / width + branch_eps);
#pragma unroll
        for (int j = 0; j < LOADS; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int k = L::first(j * blockDim.x + threadIdx.x) + i * L::APART;
                Floats4 plus = times4(b[j][i], branch_by[j][i]);
                h[j][i].x = (h[j][i].x + plus.x * rms) * scale;
                h[j][i].y = (h[j][i].y + plus.y * rms) * scale;
                h[j][i].z = (h[j][i].z + plus.z * rms) * scale;
                h[j][i].w = (h[j][i].w + plus.w * rms) * scale;
                if (blockIdx.x == 0 && k < width) *(Floats4*)(updated + k) = h[j][i];
            }
    }
    if ((INPUT & NORM) || (BITS != 8 && !(INPUT & BOUNDED))) {
        sum = 0.0f;
#pragma unroll
        for (int j = 0; j < LOADS; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (INPUT & NORM) {
                    sum += dot4(h[j][i], h[j][i]);
                    h[j][i] = times4(h[j][i], by[j][i]);
                }
                largest = fmaxf(largest, fmaxf(fmaxf(fabsf(h[j][i].x), fabsf(h[j][i].y)),
                                               fmaxf(fabsf(h[j][i].z), fabsf(h[j][i].w))));
            }
        block_reduce(sum, largest, places[1]);
    }
    float factor = INPUT & NORM ? rsqrtf(sum / width + eps) : 1.0f, back = 1.0f;
    if (BITS != 8 && !(INPUT & BOUNDED)) {
        int exponent = __float_as_uint(largest * factor) >> 23 & 255;
        if (exponent > 7 && exponent < 254) {
            factor *= __uint_as_float((u32)(261 - exponent) << 23);
            back = __uint_as_float((u32)(exponent - 7) << 23);
        }
    }
    Floats4 factors = {factor, factor, factor, factor};
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
        int eight = j * blockDim.x + threadIdx.x;
        if (eight * 8 < turns * L::TURN) L::store(shared, eight, times4(h[j][0], factors), times4(h[j][1], factors));
    }
    for (int eight = LOADS * blockDim.x + threadIdx.x; eight * 8 < turns * L::TURN; eight += blockDim.x)
        L::store(shared, eight, Floats4{0, 0, 0, 0}, Floats4{0, 0, 0, 0});
    __syncthreads();

    float sums[ROWS];
    float top = LOWEST;
    int top_row = 0x7fffffff;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] = 0.0f;
    while (unit < units) {
        int next_unit = unit, next_part = part + 1;
        if (next_part == parts) {
            next_part = 0;
            next_unit += step;
        }
        if (next_part == 0) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                w_at[r] += w_step;
                s_at[r] += s_step;
            }
        }
        if (next_unit < units) load(next_part, w_next, s_next);
#pragma unroll
        for (int t = 0; t < TURNS; ++t) {
            int turn = part * TURNS + t;
            if (WHOLE || turn < turns) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) sums[r] += Dot<BITS>::of(w[r][t], shared, turn, lane) * s[r][t];
            }
        }
        if (next_part == 0) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[r] = warp_sum(sums[r]) * back;
            if (RESULT == GATED) {
                if (lane == 0) out[unit] = activate(sums[0], activation) * sums[ROWS - 1];
            } else {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    int row = unit * ROWS + r;
                    float value = sums[r];
                    if (RESULT == LOGITS) {
                        if (softcap > 0.0f) value = tanhf(value / softcap) * softcap;
                        if (value > top) {  // rows ascend: the first of the largest stays
                            top = value;
                            top_row = row;
                        }
                    }
                    if (RESULT == TIMES) value = activate(value, activation) * other[row];
                    if (lane == 0) out[row] = value;
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[r] = 0.0f;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int t = 0; t < TURNS; ++t) {
                w[r][t] = w_next[r][t];
                s[r][t] = s_next[r][t];
            }
        unit = next_unit;
        part = next_part;
    }
    if (RESULT == LOGITS) {
        int* rows_of = (int*)places[2];
        if (lane == 0) {
            places[2][32 + warp] = top;
            rows_of[warp] = top_row;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 1; i < blockDim.x / WARP; ++i)
                if (places[2][32 + i] > top || (places[2][32 + i] == top && rows_of[i] < top_row)) {
                    top = places[2][32 + i];
                    top_row = rows_of[i];
                }
            best_value[blockIdx.x] = top;
            best_row[blockIdx.x] = top_row;
        }
    }
}

// The id with the largest of `count` logits, each the best of its rows: the first of them. 512 threads.
__global__ void pick(const float* values, const int* rows, int count, i64* id) {
    __shared__ float tops[512 / WARP];
    __shared__ int top_rows[512 / WARP];
    wait_for_previous();
    float top = LOWEST;
    int row = 0x7fffffff, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    auto better = [&](float value, int other) {
        if (value > top || (value == top && other < row)) {
            top = value;
            row = other;
        }
    };
    auto join = [&] {
        for (int offset = 16; offset; offset >>= 1) {
            float value = __shfl_xor_sync(ALL, top, offset);
            better(value, __shfl_xor_sync(ALL, row, offset));
        }
    };
    for (int i = threadIdx.x; i < count; i += blockDim.x) better(values[i], rows[i]);
    join();
    if (lane == 0) {
        tops[warp] = top;
        top_rows[warp] = row;
    }
    __syncthreads();
    if (warp == 0) {
        if (lane < 512 / WARP) better(tops[lane], top_rows[lane]);
        join();
        if (lane == 0) *id = row == 0x7fffffff ? 0 : row;
    }
}

// Per-layer inputs: (rms_norm(context * context_scale) * weight + identity) * scale for each layer, a block each.
__global__ void mix(const float* context, const float* weight, const float* identity, int width,
                    float context_scale, float scale, float eps, float* out) {
    __shared__ float place[64];
    wait_for_previous();
    let_next_start();
    int first = blockIdx.x * width;
    float sum = 0.0f, none = 0.0f;
    for (int k = threadIdx.x; k < width; k += blockDim.x) {
        float value = context[first + k] * context_scale;
        sum += value * value;
    }
    block_reduce(sum, none, place);
    float rms = rsqrtf(sum / width + eps);
    for (int k = threadIdx.x; k < width; k += blockDim.x)
        out[first + k] = (context[first + k] * context_scale * rms * weight[k] + identity[first + k]) * scale;
}

// --------------------------------------------------------------------------------------------------- attention

constexpr int STRIP = 8;  // values of a row that a block of `make_room` moves: 16 bytes

// A sliding cache's two halves, (kv_heads, capacity, dim) float16.
struct Sliding {
    u16 *keys, *values;
    int kv_heads, capacity, dim, unused;
};

// Moves all full sliding caches up a row, which drops their oldest. Grid: strips of all heads, caches, 2.
__global__ void make_room(const Sliding* caches, const i64* position) {
    wait_for_previous();
    let_next_start();
    Sliding of = caches[blockIdx.y];
    int strips = of.dim / STRIP, head = blockIdx.x / strips;
    if (head >= of.kv_heads || *position < of.capacity) return;
    u16* cache = (blockIdx.z ? of.values : of.keys) + (i64)head * of.capacity * of.dim + blockIdx.x % strips * STRIP;
    for (int first = 0; first < of.capacity - 1; first += 4 * blockDim.x) {  // all of E2B's window at once
        Words4 moved[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int row = first + j * blockDim.x + threadIdx.x + 1;
            if (row < of.capacity) moved[j] = *(const Words4*)(cache + (i64)row * of.dim);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int row = first + j * blockDim.x + threadIdx.x + 1;
            if (row < of.capacity) *(Words4*)(cache + (i64)(row - 1) * of.dim) = moved[j];
        }
    }
}

// A head's values, normalised, then rotated if there is a rotation: one warp. cos, sin: DIM / 2 float16.
template <int DIM, typename Write>
__device__ inline void normed_head(const float* from, const float* weight, const u16* cos, const u16* sin, float eps,
                                   Write write) {
    constexpr int EACH = DIM >= 2 * WARP ? DIM / (2 * WARP) : 1;  // pairs of a lane
    int lane = threadIdx.x % WARP;
    float a[EACH], b[EACH], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int d = i * WARP + lane;
        a[i] = d < DIM / 2 ? from[d] : 0.0f;
        b[i] = d < DIM / 2 ? from[d + DIM / 2] : 0.0f;
        sum += a[i] * a[i] + b[i] * b[i];
    }
    float rms = rsqrtf(warp_sum(sum) / DIM + eps);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int d = i * WARP + lane;
        if (d >= DIM / 2) continue;
        float low = a[i] * rms, high = b[i] * rms;
        if (weight != nullptr) {
            low *= weight[d];
            high *= weight[d + DIM / 2];
        }
        if (cos != nullptr) {
            float c = widen(cos[d]), s = widen(sin[d]), turned = high * c + low * s;
            low = low * c - high * s;
            high = turned;
        }
        write(d, low);
        write(d + DIM / 2, high);
    }
}

constexpr int MOST_SPLITS = 32;  // of the keys among blocks
constexpr int LOOKS = 256 / WARP;  // warps of a block of `attend`

// Attention of HEADS query heads that share a key head, over the cache's rows in use; a layer that WRITES first
// puts the new token's key and value into its cache (kv_heads, capacity, DIM) float16. Grid: groups of HEADS, splits.
// partial: (heads, splits, DIM + 4) float32; counters: one for each group, 0 before and after. 256 threads.
//
// A block has TILE keys at a time, all of whose reads are under way at once: a warp has whole keys, for their
// scores; a team of threads has whole rows of values, eight of each row's to a thread.
template <int DIM, int HEADS, bool WRITES>
__global__ void __launch_bounds__(256) attend(
    const float* queries, const float* new_keys, const float* new_values, const float* query_weight,
    const float* key_weight, const u16* cos, const u16* sin, const i64* position, u16* keys, u16* values,
    int capacity, int sliding, int heads_of_each, float eps, float* partial, u32* counters, float* out) {
    constexpr int TILE = DIM == 512 ? 32 : 64;
    constexpr int VECTOR = DIM >= 256 ? 8 : (DIM >= 32 ? DIM / 32 : 1);  // values of a lane's read of a key
    constexpr int READS = DIM > 32 * VECTOR ? DIM / (32 * VECTOR) : 1;
    constexpr int EACH = TILE / LOOKS;  // keys of a warp
    constexpr int MEMBERS = DIM / 8, TEAMS = 256 / MEMBERS;
    constexpr int RUN = TILE >= TEAMS ? TILE / TEAMS : 1;  // rows of values of a team
    __shared__ float query[HEADS][DIM];
    __shared__ __align__(16) u16 new_row[2][DIM];
    __shared__ float scores[TILE][HEADS];
    __shared__ float rescale[HEADS], maxima[HEADS], sums[HEADS];
    __shared__ __align__(16) float joined[TEAMS * HEADS * DIM];
    __shared__ float shares[HEADS][MOST_SPLITS];
    __shared__ int last_block;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, splits = gridDim.y, split = blockIdx.y;
    int first_head = blockIdx.x * HEADS, key_head = first_head / heads_of_each;
    int member = threadIdx.x % MEMBERS, team = threadIdx.x / MEMBERS;
    wait_for_previous();
    let_next_start();
    i64 at = *position;
    int rows = (int)(sliding && at >= capacity ? capacity : at + 1);
    int share = (rows + splits - 1) / splits, begin = split * share;
    int end = begin + share < rows ? begin + share : rows;
    keys += (i64)key_head * capacity * DIM;
    values += (i64)key_head * capacity * DIM;
    const u16 *c = cos + at * (DIM / 2), *s = sin + at * (DIM / 2);

    __align__(16) u16 key[EACH][READS * VECTOR];
    Words4 value[RUN];
    auto look = [&](int tile) {
        int last = end - 1;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            int row = tile + warp + LOOKS * j < last ? tile + warp + LOOKS * j : last;
            const u16* from = keys + (i64)row * DIM;
#pragma unroll
            for (int r = 0; r < READS; ++r) {
                int d = (r * WARP + lane) * VECTOR;
                if (VECTOR == 8) {
                    *(Words4*)(key[j] + r * VECTOR) = *(const Words4*)(from + d);
                } else {
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) key[j][r * VECTOR + i] = d + i < DIM ? from[d + i] : 0;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            int row = tile + team + TEAMS * j < last ? tile + team + TEAMS * j : last;
            value[j] = ((const Words4*)(values + (i64)row * DIM))[member];
        }
    };
    if (begin < end) look(begin);

    bool writes = WRITES && end == rows && begin < end;
    if (warp < HEADS) {
        normed_head<DIM>(queries + (first_head + warp) * DIM, query_weight, c, s, eps,
                         [&](int d, float value) { query[warp][d] = value; });
    } else if (writes) {  // every group of heads writes the same
        i64 row = (i64)(rows - 1) * DIM;
        if (warp == HEADS)
            normed_head<DIM>(new_keys + key_head * DIM, key_weight, c, s, eps,
                             [&](int d, float value) { keys[row + d] = new_row[0][d] = narrow(value); });
        if (warp == HEADS + 1)
            normed_head<DIM>(new_values + key_head * DIM, (const float*)nullptr, (const u16*)nullptr,
                             (const u16*)nullptr, eps,
                             [&](int d, float value) { values[row + d] = new_row[1][d] = narrow(value); });
    }
    if (threadIdx.x < HEADS) {
        maxima[threadIdx.x] = LOWEST;
        sums[threadIdx.x] = 0.0f;
    }
    __syncthreads();
    float q[HEADS][READS * VECTOR];
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int i = 0; i < READS * VECTOR; ++i) {
            int d = (i / VECTOR * WARP + lane) * VECTOR + i % VECTOR;
            q[h][i] = d < DIM ? query[h][d] : 0.0f;
        }
    float held[HEADS][8];
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int i = 0; i < 8; ++i) held[h][i] = 0.0f;

    for (int tile = begin; tile < end; tile += TILE) {
        int count = end - tile < TILE ? end - tile : TILE;
        if (writes && tile + count == end) {  // the new row was read before it was there
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if (tile + warp + LOOKS * j >= end - 1) {
#pragma unroll
                    for (int i = 0; i < READS * VECTOR; ++i) {
                        int d = (i / VECTOR * WARP + lane) * VECTOR + i % VECTOR;
                        key[j][i] = d < DIM ? new_row[0][d] : 0;
                    }
                }
#pragma unroll
            for (int j = 0; j < RUN; ++j)
                if (tile + team + TEAMS * j >= end - 1) value[j] = ((const Words4*)new_row[1])[member];
        }
        float dots[EACH][HEADS];
#pragma unroll
        for (int j = 0; j < EACH; ++j)
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                dots[j][h] = 0.0f;
#pragma unroll
                for (int i = 0; i < READS * VECTOR; ++i) dots[j][h] += q[h][i] * widen(key[j][i]);
            }
#pragma unroll
        for (int offset = 16; offset; offset >>= 1)
#pragma unroll
            for (int j = 0; j < EACH; ++j)
#pragma unroll
                for (int h = 0; h < HEADS; ++h) dots[j][h] += __shfl_xor_sync(ALL, dots[j][h], offset);
        if (lane == 0) {
#pragma unroll
            for (int j = 0; j < EACH; ++j)
#pragma unroll
                for (int h = 0; h < HEADS; ++h) scores[warp + LOOKS * j][h] = dots[j][h];
        }
        __syncthreads();
        if (warp < HEADS) {
            float score[TILE / WARP], before = maxima[warp], most = before, sum = 0.0f;
#pragma unroll
            for (int i = 0; i < TILE / WARP; ++i) {
                score[i] = lane + WARP * i < count ? scores[lane + WARP * i][warp] : LOWEST;
                most = fmaxf(most, score[i]);
            }
            most = warp_max(most);
#pragma unroll
            for (int i = 0; i < TILE / WARP; ++i) {
                score[i] = lane + WARP * i < count ? expf(score[i] - most) : 0.0f;
                scores[lane + WARP * i][warp] = score[i];
                sum += score[i];
            }
            sum = warp_sum(sum);
            if (lane == 0) {
                rescale[warp] = expf(before - most);
                maxima[warp] = most;
                sums[warp] = sums[warp] * rescale[warp] + sum;
            }
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
            for (int i = 0; i < 8; ++i) held[h][i] *= rescale[h];
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            int t = team + TEAMS * j;
            if (t >= TILE) break;
            const u32 words[4] = {value[j].x, value[j].y, value[j].z, value[j].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float low = widen((u16)words[i]), high = widen((u16)(words[i] >> 16));
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    held[h][2 * i] += scores[t][h] * low;
                    held[h][2 * i + 1] += scores[t][h] * high;
                }
            }
        }
        if (tile + TILE < end) look(tile + TILE);
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        Floats4* to = (Floats4*)(joined + (team * HEADS + h) * DIM + 8 * member);
        to[0] = Floats4{held[h][0], held[h][1], held[h][2], held[h][3]};
        to[1] = Floats4{held[h][4], held[h][5], held[h][6], held[h][7]};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HEADS * DIM; i += 256) {
        float sum = 0.0f;
        for (int j = 0; j < TEAMS; ++j) sum += joined[j * HEADS * DIM + i];
        partial[((i64)(first_head + i / DIM) * splits + split) * (DIM + 4) + i % DIM] = sum;
    }
    if (threadIdx.x < HEADS) {
        float* to = partial + ((i64)(first_head + threadIdx.x) * splits + split) * (DIM + 4) + DIM;
        to[0] = maxima[threadIdx.x];
        to[1] = sums[threadIdx.x];
    }
    // The block that is done last joins them all.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last_block = atomicAdd(&counters[blockIdx.x], 1u) == (u32)splits - 1;
    __syncthreads();
    if (!last_block) return;
    __threadfence();
    if (threadIdx.x == 0) counters[blockIdx.x] = 0;
    constexpr int FOURS = HEADS * DIM / 4, GROUPS = 256 / FOURS;  // each group of threads has some of the splits
    int four = threadIdx.x % FOURS, group = threadIdx.x / FOURS, own = four * 4 / DIM;
    const float* of = partial + (i64)(first_head + own) * splits * (DIM + 4);
    Floats4 parts[MOST_SPLITS / GROUPS > 0 ? MOST_SPLITS / GROUPS : 1];
    constexpr int PARTS = sizeof parts / sizeof parts[0];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
        int j = group + GROUPS * i;
        parts[i] = j < splits ? load_shared4(of + j * (DIM + 4) + four * 4 % DIM) : Floats4{0, 0, 0, 0};
    }
    if (warp < HEADS) {
        const float* mine = partial + (i64)(first_head + warp) * splits * (DIM + 4) + DIM;
        float most = lane < splits ? __ldcg(mine + lane * (DIM + 4)) : LOWEST;
        float sum = lane < splits ? __ldcg(mine + lane * (DIM + 4) + 1) : 0.0f;
        float weight = expf(most - warp_max(most)) * (sum > 0.0f);
        shares[warp][lane] = weight / warp_sum(weight * sum);
    }
    __syncthreads();
    Floats4 result = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
        int j = group + GROUPS * i;
        float share = j < splits ? shares[own][j] : 0.0f;
        result.x += share * parts[i].x;
        result.y += share * parts[i].y;
        result.z += share * parts[i].z;
        result.w += share * parts[i].w;
    }
    if (group < GROUPS) *(Floats4*)(joined + group * HEADS * DIM + four * 4) = result;
    __syncthreads();
    for (int i = threadIdx.x; i < HEADS * DIM; i += 256) {
        float sum = 0.0f;
        for (int j = 0; j < GROUPS; ++j) sum += joined[j * HEADS * DIM + i];
        out[first_head * DIM + i] = sum;
    }
}
