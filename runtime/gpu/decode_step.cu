// The kernels of one decode step: a single row through a Gemma 4 text model, some 270 launches for E2B.
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
// A lane takes 8 bytes of a row at each of its turns: 32, 16 or 8 weights.
template <int BITS> struct Layout {
    static constexpr int LANE = 64 / BITS;  // weights of a lane's turn
    static constexpr int TURN = LANE * WARP;
    static constexpr int PLANES = BITS == 2 ? 4 : 2;  // 16-byte reads of a lane's turn

    static __device__ inline void store(unsigned char* shared, int k, float value) {
        int turn = k / TURN, lane = k / LANE % WARP, in = k % LANE;
        if (BITS == 8) {
            ((float*)shared)[((turn * PLANES + in / 4) * WARP + lane) * 4 + in % 4] = value;
        } else if (BITS == 4) {  // a word's nibbles i and i + 4 are unpacked as a pair
            int of = in % 8;
            ((u16*)shared)[((turn * PLANES + in / 8) * WARP + lane) * 8 + of % 4 * 2 + of / 4] = narrow(value);
        } else {  // crumbs i and i + 8
            int of = in % 16;
            int plane = in / 16 * 2 + of % 8 / 4;
            ((u16*)shared)[((turn * PLANES + plane) * WARP + lane) * 8 + of % 4 * 2 + of / 8] = narrow(value);
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

__device__ inline float scale_of(const float* scales, i64 at) { return scales[at]; }
__device__ inline float scale_of(const u16* scales, i64 at) { return widen(scales[at]); }

enum Result { STORE, GATED, TIMES, LOGITS };

// y = W x. W: `rows` rows of `width` weights. One warp computes ROWS of them at a time; of a GATED product, whose
// result is activation(gate) * up, one row of each of two matrices.
//
// x, in shared memory for the whole block:
//   hidden = (x + rms_norm(branch) * branch_weight) * scale   where there is a branch; else x
//   input = rms_norm(hidden) * weight                         where there is a weight; else hidden
// Block 0 writes `hidden` to `updated`, which no block reads.
template <int BITS, typename Scale, int RESULT, int ROWS, int TURNS>
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
    int blocks = row_bytes * (8 / BITS) >> block_shift;

    Words2 w[ROWS][TURNS], w_next[ROWS][TURNS];
    float s[ROWS][TURNS], s_next[ROWS][TURNS];

    auto load = [&](int unit, int part, Words2 (&w)[ROWS][TURNS], float (&s)[ROWS][TURNS]) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            bool up = RESULT == GATED && r == 1;
            i64 row = RESULT == GATED ? unit : (i64)unit * ROWS + r;
            const unsigned char* from = (up ? weights_up : weights) + row * row_bytes;
            const Scale* by = (up ? scales_up : scales) + row * blocks;
#pragma unroll
            for (int t = 0; t < TURNS; ++t) {
                int at = (part * TURNS + t) * WARP + lane;
                bool inside = at * 8 < row_bytes;
                w[r][t] = inside ? load_weights(from + at * 8) : Words2{0, 0};
                s[r][t] = inside ? scale_of(by, at * L::LANE >> block_shift) : 0.0f;
            }
        }
    };

    int unit = blockIdx.x * (blockDim.x / WARP) + warp, part = 0;
    if (unit < units) load(unit, 0, w, s);
    wait_for_previous();
    let_next_start();

    // The input, with a power of two taken out.
    float largest = 0.0f, sum = 0.0f, none = 0.0f, rms = 1.0f;
    float* hidden = (float*)(shared + turns * L::TURN * (BITS == 8 ? 4 : 2));
    bool normed = branch != nullptr || weight != nullptr;
    if (normed) {
        float branch_rms = 1.0f;
        if (branch != nullptr) {
            for (int k = threadIdx.x; k < width; k += blockDim.x) sum += branch[k] * branch[k];
            block_reduce(sum, none, places[0]);
            branch_rms = rsqrtf(sum / width + branch_eps);
        }
        sum = 0.0f;
        for (int k = threadIdx.x; k < width; k += blockDim.x) {
            float value = x[k];
            if (branch != nullptr) value = (value + branch[k] * branch_rms * branch_weight[k]) * scale;
            hidden[k] = value;
            if (updated != nullptr && blockIdx.x == 0) updated[k] = value;
            sum += value * value;
            largest = fmaxf(largest, fabsf(weight != nullptr ? value * weight[k] : value));
        }
        block_reduce(sum, largest, places[1]);
        if (weight != nullptr) rms = rsqrtf(sum / width + eps);
        largest *= rms;
    } else if (BITS != 8) {
        for (int k = threadIdx.x; k < width; k += blockDim.x) largest = fmaxf(largest, fabsf(x[k]));
        block_reduce(none, largest, places[0]);
    }
    float factor = 1.0f, back = 1.0f;
    int exponent = __float_as_uint(largest) >> 23 & 255;
    if (BITS != 8 && exponent > 7 && exponent < 255) {
        factor = __uint_as_float((u32)(exponent < 260 ? 261 - exponent : 1) << 23);
        back = __uint_as_float((u32)(exponent - 7) << 23);
    }
    for (int k = threadIdx.x; k < turns * L::TURN; k += blockDim.x) {
        float value = 0.0f;
        if (k < width) {
            value = normed ? hidden[k] * rms : x[k];
            if (weight != nullptr) value *= weight[k];
        }
        L::store(shared, k, value * factor);
    }
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
        if (next_unit < units) load(next_unit, next_part, w_next, s_next);
#pragma unroll
        for (int t = 0; t < TURNS; ++t) {
            int turn = part * TURNS + t;
            if (turn < turns) {
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

// The id with the largest of `count` logits: the first of them. One warp.
__global__ void pick(const float* values, const int* rows, int count, i64* id) {
    wait_for_previous();
    float top = LOWEST;
    int row = 0x7fffffff;
    for (int i = threadIdx.x; i < count; i += WARP)
        if (values[i] > top || (values[i] == top && rows[i] < row)) {
            top = values[i];
            row = rows[i];
        }
    for (int offset = 16; offset; offset >>= 1) {
        float other = __shfl_xor_sync(ALL, top, offset);
        int other_row = __shfl_xor_sync(ALL, row, offset);
        if (other > top || (other == top && other_row < row)) {
            top = other;
            row = other_row;
        }
    }
    if (threadIdx.x == 0) *id = row == 0x7fffffff ? 0 : row;
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

// Value `i` of a head after its rotation. cos, sin: (context, DIM / 2) float16, the position's row.
template <int DIM> __device__ inline float rotated(const float* head, int i, const u16* cos, const u16* sin) {
    int pair = i < DIM / 2 ? i : i - DIM / 2;
    float c = widen(cos[pair]), s = widen(sin[pair]);
    return i < DIM / 2 ? head[i] * c - head[i + DIM / 2] * s : head[i] * c + head[i - DIM / 2] * s;
}

constexpr int STRIP = 8;  // values of a row that a block of `append` moves: 16 bytes

// Puts the new token's key and value into their caches (kv_heads, capacity, DIM) float16; a full sliding cache
// moves up a row. Grid: DIM / STRIP strips, kv_heads, keys and values.
template <int DIM>
__global__ void append(const float* keys, const float* values, const float* key_weight, const u16* cos,
                       const u16* sin, const i64* position, u16* key_cache, u16* value_cache, int capacity,
                       int sliding, float eps) {
    __shared__ float place[64];
    __shared__ float head[DIM];
    wait_for_previous();
    let_next_start();
    bool is_value = blockIdx.z == 1;
    const float* from = (is_value ? values : keys) + blockIdx.y * DIM;
    u16* cache = (is_value ? value_cache : key_cache) + (i64)blockIdx.y * capacity * DIM + blockIdx.x * STRIP;
    float sum = 0.0f, none = 0.0f;
    for (int i = threadIdx.x; i < DIM; i += blockDim.x) sum += from[i] * from[i];
    block_reduce(sum, none, place);
    float rms = rsqrtf(sum / DIM + eps);
    for (int i = threadIdx.x; i < DIM; i += blockDim.x) head[i] = from[i] * rms * (is_value ? 1.0f : key_weight[i]);
    i64 at = *position;
    bool full = sliding && at >= capacity;
    if (full) {
        at = capacity - 1;
        for (int first = 0; first < capacity - 1; first += 4 * blockDim.x) {  // all of E2B's window at once
            Words4 moved[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int row = first + j * blockDim.x + threadIdx.x + 1;
                if (row < capacity) moved[j] = *(const Words4*)(cache + (i64)row * DIM);
            }
            __syncthreads();
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int row = first + j * blockDim.x + threadIdx.x + 1;
                if (row < capacity) *(Words4*)(cache + (i64)(row - 1) * DIM) = moved[j];
            }
        }
    }
    __syncthreads();
    if (threadIdx.x < STRIP) {
        int i = blockIdx.x * STRIP + threadIdx.x;
        i64 turn = *position * (DIM / 2);
        cache[at * DIM + threadIdx.x] = narrow(is_value ? head[i] : rotated<DIM>(head, i, cos + turn, sin + turn));
    }
}

constexpr int TILE = 64;         // keys at a time
constexpr int MOST_SPLITS = 32;  // of the keys among blocks

// Attention of HEADS query heads that share a key head, over the cache's rows in use. Grid: splits, groups of HEADS.
// partial: (heads, splits, DIM + 2) float32; counters: one for each group, 0 before and after. 256 threads.
template <int DIM, int HEADS>
__global__ void attend(const float* queries, const float* query_weight, const u16* cos, const u16* sin,
                       const i64* position, const u16* keys, const u16* values, int capacity, int sliding,
                       int heads_of_each, float eps, float* partial, u32* counters, float* out) {
    constexpr int VECTOR = DIM >= 256 ? 8 : (DIM >= 32 ? DIM / 32 : 1);  // values of a lane's read
    constexpr int READS = DIM > 32 * VECTOR ? DIM / (32 * VECTOR) : 1;
    constexpr int PAIRS = DIM / 2, TEAMS = PAIRS >= 256 ? 1 : 256 / PAIRS;  // of threads that take turns at rows
    constexpr int SPAN = PAIRS > 256 ? PAIRS / 256 : 1;
    __shared__ float query[HEADS][DIM];
    __shared__ float scores[TILE][HEADS];
    __shared__ float rescale[HEADS], maxima[HEADS], sums[HEADS];
    __shared__ float joined[TEAMS > 1 ? TEAMS * HEADS * DIM : 1];
    __shared__ float shares[HEADS][MOST_SPLITS];
    __shared__ int last_block;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, splits = gridDim.x, split = blockIdx.x;
    int first_head = blockIdx.y * HEADS, key_head = first_head / heads_of_each;
    wait_for_previous();
    let_next_start();
    i64 at = *position;
    int rows = (int)(sliding && at >= capacity ? capacity : at + 1);
    int share = (rows + splits - 1) / splits, begin = split * share;
    int end = begin + share < rows ? begin + share : rows;
    keys += (i64)key_head * capacity * DIM;
    values += (i64)key_head * capacity * DIM;

    if (warp < HEADS) {  // queries: norm, then rotation
        const float* from = queries + (first_head + warp) * DIM;
        float sum = 0.0f;
        for (int i = lane; i < DIM; i += WARP) sum += from[i] * from[i];
        float rms = rsqrtf(warp_sum(sum) / DIM + eps);
        const u16 *c = cos + at * (DIM / 2), *s = sin + at * (DIM / 2);
        for (int i = lane; i < DIM / 2; i += WARP) {
            float a = from[i] * rms * query_weight[i], b = from[i + DIM / 2] * rms * query_weight[i + DIM / 2];
            float cosine = widen(c[i]), sine = widen(s[i]);
            query[warp][i] = a * cosine - b * sine;
            query[warp][i + DIM / 2] = b * cosine + a * sine;
        }
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

    float held[HEADS][SPAN][2];
    int pair = threadIdx.x % (PAIRS < 256 ? PAIRS : 256), team = threadIdx.x / (PAIRS < 256 ? PAIRS : 256);
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int i = 0; i < SPAN; ++i) held[h][i][0] = held[h][i][1] = 0.0f;

    for (int tile = begin; tile < end; tile += TILE) {
        int count = end - tile < TILE ? end - tile : TILE;
        for (int t = warp; t < count; t += 8) {
            const u16* key = keys + (i64)(tile + t) * DIM;
            float dots[HEADS];
#pragma unroll
            for (int h = 0; h < HEADS; ++h) dots[h] = 0.0f;
#pragma unroll
            for (int r = 0; r < READS; ++r) {
                int d = (r * WARP + lane) * VECTOR;
                u16 part[VECTOR];
                if (VECTOR == 8) {
                    *(Words4*)part = *(const Words4*)(key + d);
                } else {
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) part[i] = d + i < DIM ? key[d + i] : 0;
                }
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) {
                    float value = widen(part[i]);
#pragma unroll
                    for (int h = 0; h < HEADS; ++h) dots[h] += q[h][r * VECTOR + i] * value;
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; ++h) dots[h] = warp_sum(dots[h]);
            if (lane == 0) {
#pragma unroll
                for (int h = 0; h < HEADS; ++h) scores[t][h] = dots[h];
            }
        }
        __syncthreads();
        if (warp < HEADS) {
            float a = lane < count ? scores[lane][warp] : LOWEST;
            float b = lane + WARP < count ? scores[lane + WARP][warp] : LOWEST;
            float before = maxima[warp], most = fmaxf(before, warp_max(fmaxf(a, b)));
            a = lane < count ? expf(a - most) : 0.0f;
            b = lane + WARP < count ? expf(b - most) : 0.0f;
            scores[lane][warp] = a;
            scores[lane + WARP][warp] = b;
            float sum = warp_sum(a + b), by = expf(before - most);
            if (lane == 0) {
                rescale[warp] = by;
                maxima[warp] = most;
                sums[warp] = sums[warp] * by + sum;
            }
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
            for (int i = 0; i < SPAN; ++i) {
                held[h][i][0] *= rescale[h];
                held[h][i][1] *= rescale[h];
            }
        if (team < TEAMS) {
#pragma unroll 8
            for (int t = team; t < count; t += TEAMS) {
                const u32* row = (const u32*)(values + (i64)(tile + t) * DIM);
#pragma unroll
                for (int i = 0; i < SPAN; ++i) {
                    u32 two = row[i * 256 + pair];
                    float low = widen((u16)two), high = widen((u16)(two >> 16));
#pragma unroll
                    for (int h = 0; h < HEADS; ++h) {
                        held[h][i][0] += scores[t][h] * low;
                        held[h][i][1] += scores[t][h] * high;
                    }
                }
            }
        }
        __syncthreads();
    }

    if (TEAMS > 1) {
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            joined[(team * HEADS + h) * DIM + 2 * pair] = held[h][0][0];
            joined[(team * HEADS + h) * DIM + 2 * pair + 1] = held[h][0][1];
        }
        __syncthreads();
    }
    for (int h = 0; h < HEADS; ++h) {
        float* to = partial + ((i64)(first_head + h) * splits + split) * (DIM + 2);
        if (TEAMS > 1) {
            for (int d = threadIdx.x; d < DIM; d += 256) {
                float sum = 0.0f;
                for (int i = 0; i < TEAMS; ++i) sum += joined[(i * HEADS + h) * DIM + d];
                to[d] = sum;
            }
        } else {
#pragma unroll
            for (int i = 0; i < SPAN; ++i) {
                to[2 * (i * 256 + pair)] = held[h][i][0];
                to[2 * (i * 256 + pair) + 1] = held[h][i][1];
            }
        }
        if (threadIdx.x == 0) {
            to[DIM] = maxima[h];
            to[DIM + 1] = sums[h];
        }
    }
    // The block that is done last joins them all.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last_block = atomicAdd(&counters[blockIdx.y], 1u) == (u32)splits - 1;
    __syncthreads();
    if (!last_block) return;
    __threadfence();
    if (threadIdx.x == 0) counters[blockIdx.y] = 0;
    if (warp < HEADS) {
        const float* of = partial + (i64)(first_head + warp) * splits * (DIM + 2);
        float most = lane < splits ? __ldcg(of + lane * (DIM + 2) + DIM) : LOWEST;
        float sum = lane < splits ? __ldcg(of + lane * (DIM + 2) + DIM + 1) : 0.0f;
        float weight = expf(most - warp_max(most)) * (sum > 0.0f);
        float total = warp_sum(weight * sum);
        shares[warp][lane] = weight / total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HEADS * DIM; i += 256) {
        int h = i / DIM, d = i % DIM;
        const float* of = partial + (i64)(first_head + h) * splits * (DIM + 2) + d;
        float sum = 0.0f;
#pragma unroll 8
        for (int j = 0; j < splits; ++j) sum += shares[h][j] * __ldcg(of + j * (DIM + 2));
        out[(first_head + h) * DIM + d] = sum;
    }
}
