// y = x W^T for up to 8 rows of x, in FP8 with a scale for each run of 128, and weights W in FP8 (e4m3), at the rate at
// which the GPU's memory delivers W.
//
// A thread block has 16 rows of W and one of the splits of its inner dimension K. Its warps take units of 128 elements
// of K in turns. W goes from memory straight into the registers of `mma` (PTX ISA, "mma.m16n8k32"), 16 bytes a load:
// that permutes K within a unit, which changes nothing as x is loaded alike. The first units of W are requested before
// the previous kernel has ended (programmatic dependent launch): no kernel writes W.
//
// Compiled with WARPS, AHEAD (units that a warp has on their way), RESIDENT (blocks of a multiprocessor), FLOAT16;
// BLOCKS: W has a scale for each 128x128, not each row; PARTS: the result is float32 (splits, rows, columns), sums to be
// added.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr u32 TILE = 16;   // rows of W of a thread block
constexpr u32 TOKENS = 8;  // rows of x
constexpr u32 UNIT = 128;

struct Piece { uint4 low, high; };  // 16 elements of rows g and g + 8

__device__ inline uint4 fetch(const char* from) {
    uint4 piece;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w) : "l"(from));
    return piece;
}

__device__ inline void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
                 " {%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline float unpack(u16 bits) {
#if FLOAT16
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

__device__ inline u16 pack(float value) {
    u16 bits;
#if FLOAT16
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

// x (rows, inner); x_scale (rows, inner / 128), column by column, `padded` apart; w (columns, inner); w_scale (columns,)
// or (columns / 128, inner / 128); out (rows, columns).
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) fp8_rows(
    const char* x, const float* x_scale, const char* w, const float* w_scale, const u16* bias, void* out, u32 rows,
    u32 padded, u32 columns, u32 inner) {
    __shared__ float sums[WARPS][TOKENS][TILE + 1];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4;
    const u32 tiles = columns / TILE, tile = blockIdx.x % tiles, split = blockIdx.x / tiles, splits = gridDim.x / tiles;
    const u32 units = inner / UNIT, end = (split + 1) * units / splits, first = split * units / splits + warp;
    const char* const weights = w + (u64)(tile * TILE + group) * inner + lane % 4 * 16;
    const char* const tokens = x + group * inner + lane % 4 * 16;

    Piece ahead[AHEAD][2];
    auto request = [&](Piece& piece, u32 i, u32 half) {
        const char* from = weights + i * UNIT + half * 64;
        piece.low = fetch(from), piece.high = fetch(from + 8 * inner);
    };
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++)
        if (first + a * WARPS < end) request(ahead[a][0], first + a * WARPS, 0), request(ahead[a][1], first + a * WARPS, 1);
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");

    float total[4] = {};
    for (u32 start = first; start < end; start += AHEAD * WARPS) {
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            const u32 i = start + a * WARPS;
            if (i >= end) break;
            uint4 b[2] = {};
            float scale = 0.0f, part[4] = {};
            if (group < rows) {
                b[0] = *(const uint4*)(tokens + i * UNIT);
                b[1] = *(const uint4*)(tokens + i * UNIT + 64);
                scale = x_scale[group + i * padded];
            }
            if (BLOCKS) scale *= w_scale[tile * TILE / UNIT * units + i];
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const uint4 low = ahead[a][half].low, high = ahead[a][half].high;
                multiply(part, low.x, high.x, low.y, high.y, b[half].x, b[half].y);
                multiply(part, low.z, high.z, low.w, high.w, b[half].z, b[half].w);
                if (i + AHEAD * WARPS < end) request(ahead[a][half], i + AHEAD * WARPS, half);
            }
            const float even = __shfl_sync(~0u, scale, lane % 4 * 8), odd = __shfl_sync(~0u, scale, lane % 4 * 8 + 4);
            total[0] += part[0] * even, total[1] += part[1] * odd, total[2] += part[2] * even, total[3] += part[3] * odd;
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) sums[warp][lane % 4 * 2 + i % 2][group + i / 2 * 8] = total[i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < rows * TILE; i += WARPS * 32) {
        const u32 row = i / TILE, column = tile * TILE + i % TILE;
        float sum = 0.0f;
#pragma unroll
        for (u32 other = 0; other < WARPS; other++) sum += sums[other][row][i % TILE];
        if (!BLOCKS) sum *= w_scale[column];
        if (PARTS) {
            ((float*)out)[((u64)split * rows + row) * columns + column] = sum;
        } else {
            ((u16*)out)[(u64)row * columns + column] = pack(bias ? sum + unpack(bias[column]) : sum);
        }
    }
}
