// y = x W^T for a few rows of x, at the rate at which the GPU's memory delivers the weights W.
//
// The weights are the larger operand, so they are the 64 rows of `wgmma` (PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions"), and the TOKENS rows of x are its columns. A thread block has a tile of 64 rows of W, or one of SPLITS
// splits of its inner dimension K where the tiles alone would be too few. A cluster is SIDES neighbouring tiles with all
// their splits: its sides need the same slabs of x, of which each fetches a share for all; its splits add up their sums
// through each other's shared memory, always in the order of K.
//
// One thread fetches slabs of W and x, 64 elements of K long, into a ring of STAGES in shared memory
// (`cp.async.bulk.tensor`); a warpgroup multiplies them. The first STAGES slabs of W are requested before the previous
// kernel has ended (programmatic dependent launch): no kernel writes W.
//
// Compiled with TOKENS (a multiple of 16 up to 256), SIDES, SPLITS, STAGES, GATED and FLOAT16, and `multiply` in front.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr u32 SLAB = 64;                                     // elements of K, 128 bytes: a row of the swizzle
constexpr u32 TILE = 64;
constexpr u32 WEIGHT_BYTES = TILE * SLAB * 2;                // of a slab of W
constexpr u32 TOKEN_BYTES = TOKENS * SLAB * 2;               // of a slab of x
constexpr u32 STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
constexpr u32 CONSUMERS = 128;                               // threads that multiply
constexpr u32 SUMS = TOKENS / 2;                             // of each of them
constexpr u32 FEATURES = GATED ? TILE / 2 : TILE;            // columns of y in a tile
constexpr u64 ONCE = 0x12F0000000000000ull;                  // L2 eviction policies, as `createpolicy` makes them:
constexpr u64 OFTEN = 0x14F0000000000000ull;                 // evict first, evict last

struct alignas(64) TensorMap { char opaque[128]; };

__device__ inline u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ inline u32 address_in(u32 address, u32 block) {  // of the cluster
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

__device__ inline void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Releases at block scope only (the default): what `wgmma` has read needs no fence, which would take half a microsecond.
__device__ inline void arrive_at(u32 barrier, u32 block) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(barrier, block)) : "memory");
}

__device__ inline void wait_for(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "  @!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void cluster_arrive_releasing() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ inline void fetch_weights(u32 place, const TensorMap* map, u32 k, u32 group, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(place), "l"(map), "r"(k), "r"(0), "r"(group), "r"(barrier),
        "l"(ONCE) : "memory");
}

__device__ inline void fetch_tokens(u32 place, const TensorMap* map, u32 k, u32 row, u32 barrier, u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(place), "l"(map), "r"(k), "r"(row), "r"(barrier), "h"(blocks),
        "l"(OFTEN) : "memory");
}

// The descriptor of a matrix in shared memory with swizzled rows of 128 bytes (PTX ISA, "Matrix descriptor").
__device__ inline u64 describe(u32 place) { return (1ull << 62) | (64ull << 32) | (1ull << 16) | (u64)(place >> 4); }

#if FLOAT16
__device__ inline u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ inline float unpack(u16 bits) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
}
#else
__device__ inline u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ inline float unpack(u16 bits) { return __uint_as_float((u32)bits << 16); }
#endif

__device__ inline float rounded(float x) { return unpack((u16)pack(x, 0.0f)); }

// silu(gate) * up as `core.ops.silu_mul` rounds.
__device__ inline float gated(float gate, float up) {
    gate = rounded(gate);
    return rounded(gate / (1.0f + __expf(-gate))) * rounded(up);
}

// Sixteen rows of y, from `row` on, in a tile's columns: sums in the order of wgmma's accumulator -> rounded, transposed
// through the warp's `patch` of 512 bytes, stored.
__device__ inline void store(float* sums, u16* out, const u16* bias, u32 row, u32 tile, u32 rows, u32 columns, u32 patch) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 feature = tile * FEATURES + warp * (GATED ? 8 : 16);
    __syncwarp();
    if (GATED) {
        const u32 low = pack(gated(sums[0], sums[2]), gated(sums[1], sums[3]));
        const u32 high = pack(gated(sums[4], sums[6]), gated(sums[5], sums[7]));
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(patch + lane % 16 * 16),
                     "r"(low), "r"(high) : "memory");
    } else {
        const float low = bias ? unpack(bias[feature + lane / 4]) : 0.0f;
        const float high = bias ? unpack(bias[feature + 8 + lane / 4]) : 0.0f;
        const u32 place = patch + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place),
                     "r"(pack(sums[0] + low, sums[1] + low)), "r"(pack(sums[2] + high, sums[3] + high)),
                     "r"(pack(sums[4] + low, sums[5] + low)), "r"(pack(sums[6] + high, sums[7] + high)) : "memory");
    }
    __syncwarp();
    row += GATED ? lane : lane / 2;
    if ((!GATED || lane < 16) && row < rows) {
        uint4 piece;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w) : "r"(patch + lane * 16) : "memory");
        *(uint4*)(out + (u64)row * columns + feature + (GATED ? 0 : lane % 2 * 8)) = piece;
    }
}

// weights: W (N, K) as {K, 8 rows, 1 or gate and up, N / 8}; tokens: x (T, K); out (rows, columns); units: K / SLAB.
extern "C" __global__ void __cluster_dims__(SIDES * SPLITS, 1, 1) __launch_bounds__(CONSUMERS + 32) stream_linear(
    const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap tokens, u16* out, const u16* bias,
    u32 rows, u32 columns, u32 units) {
    extern __shared__ char dynamic[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES];
    __shared__ alignas(16) char patches[CONSUMERS / 32][512];

    const u32 ring = (shared_address(dynamic) + 1023) / 1024 * 1024;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 rank = blockIdx.x % (SIDES * SPLITS), side = rank % SIDES, split = rank / SIDES;
    const u32 tile = blockIdx.x / (SIDES * SPLITS) * SIDES + side;
    const u32 begin = split * units / SPLITS, count = (split + 1) * units / SPLITS - begin;
    const u32 full_at = shared_address(full), empty_at = shared_address(empty);

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < STAGES; stage++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full_at + 8 * stage));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty_at + 8 * stage), "n"(SIDES * CONSUMERS / 32));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_arrive();

    if (warp == CONSUMERS / 32) {
        if (lane == 0) {
            auto fetch_w = [&](u32 i, u32 stage) {
                arrive_expecting(full_at + 8 * stage, STAGE_BYTES);
                fetch_weights(ring + stage * STAGE_BYTES, &weights, (begin + i) * SLAB, tile * (FEATURES / 8), full_at + 8 * stage);
            };
            auto fetch_x = [&](u32 i, u32 stage) {
                const u32 place = ring + stage * STAGE_BYTES + WEIGHT_BYTES + side * (TOKEN_BYTES / SIDES);
                const u16 blocks = ((1 << SIDES) - 1) << (split * SIDES);
                fetch_tokens(place, &tokens, (begin + i) * SLAB, side * (TOKENS / SIDES), full_at + 8 * stage, blocks);
            };
            const u32 early = count < STAGES ? count : STAGES;
            for (u32 i = 0; i < early; i++) fetch_w(i, i);
            cluster_wait();  // every block's barriers are there
            asm volatile("griddepcontrol.wait;" ::: "memory");
            for (u32 i = 0; i < early; i++) fetch_x(i, i);
            u32 stage = 0, parity = 0;
            for (u32 i = early; i < count; i++) {
                wait_for(empty_at + 8 * stage, parity);
                fetch_w(i, stage);
                fetch_x(i, stage);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            for (u32 i = 0; i < early; i++) {  // arrivals of other blocks must not come after this one has ended
                wait_for(empty_at + 8 * stage, parity);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        } else {
            cluster_wait();
        }
        __syncwarp();
        if (SPLITS > 1) cluster_arrive(), cluster_wait(), cluster_arrive(), cluster_wait();
        return;
    }

    cluster_wait();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    float sums[SUMS];
    u32 stage = 0, parity = 0, last_stage = 0;
    for (u32 i = 0; i < count; i++) {
        wait_for(full_at + 8 * stage, parity);
        const u32 slab = ring + stage * STAGE_BYTES;
        const u64 a = describe(slab), b = describe(slab + WEIGHT_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (u32 k = 0; k < SLAB / 16; k++) multiply(sums, a + 2 * k, b + 2 * k, i > 0 || k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (i > 0) {  // the previous slab is multiplied: its stage is free, here and for the other sides' multicasts
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (lane < SIDES) arrive_at(empty_at + 8 * last_stage, split * SIDES + lane);
        }
        last_stage = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (lane < SIDES) arrive_at(empty_at + 8 * last_stage, split * SIDES + lane);

    // Split p finishes every SPLITS-th group of 16 tokens. The ring is free now and holds the sums for the other splits.
    const u32 patch = shared_address(patches[warp]);
    const u32 own = ring + threadIdx.x * 16;
    if (SPLITS > 1) {
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
#pragma unroll
        for (u32 i = 0; i < SUMS / 4; i++) {
            if (i / 2 % SPLITS == split) continue;
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(own + i * (CONSUMERS * 16)), "f"(sums[4 * i]),
                         "f"(sums[4 * i + 1]), "f"(sums[4 * i + 2]), "f"(sums[4 * i + 3]) : "memory");
        }
        cluster_arrive_releasing();
        cluster_wait();
    }
#pragma unroll
    for (u32 group = 0; group < TOKENS / 16; group++) {
        if (16 * group >= rows || tile * FEATURES >= columns) break;
        if (SPLITS > 1) {
            if (group % SPLITS != split) continue;
            float total[8] = {};
#pragma unroll
            for (u32 other = 0; other < SPLITS; other++) {
                const u32 there = address_in(own, other * SIDES + side);
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    float4 four = make_float4(sums[8 * group + 4 * i], sums[8 * group + 4 * i + 1], sums[8 * group + 4 * i + 2],
                                              sums[8 * group + 4 * i + 3]);
                    if (other != split) {
                        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                                     : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
                                     : "r"(there + (2 * group + i) * (CONSUMERS * 16)) : "memory");
                    }
                    total[4 * i] += four.x, total[4 * i + 1] += four.y, total[4 * i + 2] += four.z, total[4 * i + 3] += four.w;
                }
            }
            store(total, out, bias, 16 * group, tile, rows, columns, patch);
        } else {
            store(sums + 8 * group, out, bias, 16 * group, tile, rows, columns, patch);
        }
    }
    if (SPLITS > 1) cluster_arrive(), cluster_wait();  // others read what this block has
}
