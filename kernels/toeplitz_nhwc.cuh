// The channels_last kernel of toeplitz.cuh.
//
// Owns    a block takes eight channels, whose weights it lays out once, and computes units of some rows of outputs one after
//         the other. Rows are counted through all images, so that sixteen of a product are sixteen outputs; or from each
//         image's first on, where that wastes little and reads less. A channel's tiles are dealt to two warps, or to more
//         where there are fewer channels; where the tensor has fewer, several share a tile's kernel rows.
// Reads   eight channels of a pixel, 16 bytes, are an asynchronous copy; two or four where 8 or 4 of them are aligned. While
//         weights are laid out or a unit is multiplied, half of the warps fetch the pixels of the next to shared memory as
//         they lie; then ldmatrix turns eight pixels of eight channels around in registers, and they are stored channel by
//         channel. Where there is no room for both, or channels are odd, pixels are loaded when the unit before is done.
// Writes  outputs are staged channel by channel where the input was; ldmatrix turns them around into pixels. On sm_90
//         blocks of neighbouring channels exchange halves of them, for stores of 32 bytes: toeplitz_nhwc_pairs.cuh. What is
//         not aligned to 16 bytes is stored piece by piece, by neighbouring threads what lies side by side.
// Memory  weights; input rows of eight channels, planes half the banks apart, or outputs; a row of zeros; pixels to come.
//         31x31 on 56x56, 64 rows of outputs a unit: 44.6 + 83.5 (in pairs 84.5) + 0.1 + 82.3 KB. One block a multiprocessor;
//         of narrow kernels two, of eight warps each, one of which stores while the other multiplies (13x13 on 20x20: 108 KB).
// Times   fp16, us, H100. 31x31 on 32x128x56x56: 103, of these products 67, stores 15, the first pixels 8, turning pixels 4,
//         weights 2; without pairs 115; 5 more with each image's rows from a new tile on, 10 with nothing fetched ahead.
//         29x29 on 32x256x28x28: 56; without pairs 59; 11 and 4 more. On 16x200x48x48: 63, with rows counted through all
//         images 67, with nothing fetched ahead 69. 27x27 on 32x40x33x47: 22.8. 13x13 on 32x200x20x20: 20.6; one block a
//         multiprocessor, of sixteen warps, 22.0; on 32x128x56x56 60, 66. Where all warps lay out weights, then fetch: 103,
//         57, 65, 24.1. Channels that are not aligned, 13x13 on 56x56: 32x124 82, each thread with a whole pixel 153; 32x125
//         87, 269.
// Lost    two groups of eight warps, each with units of its own, so that one multiplies while the other loads and stores:
//         129 us for 103, 74 for 56, 76 for 64. Pixels one at a time between kernel rows: 101 for 104, 66.6 for 65.6, 37.3
//         for 35.5 (31x31 on 8x40x96x96). What is left alone of two kernel rows as one product of K = 16: no gain. Rows
//         of pixels to the L2 cache before they are fetched: 104 for 103, 23.8 for 22.6 (27x27), 36.9 for 34.9 (31x31 on
//         8x40x96x96). Three warps a channel, of one tile each, where images have 48 rows: 67 for 64, as each loads weights.
//         Few channels: 24 warps a block, 31x31 on 64x3x56x56 14.8 for 14.6; each channel a block's as in NCHW, 14.3, but
//         64x4x56x56 17.6 for 15.0 and 7x7 on 32x5x112x112 26 for 21.
#pragma once

#include "toeplitz_nhwc_pairs.cuh"
#include "toeplitz_products.cuh"

namespace depthwise {

// A channel's tiles are dealt to `slots` warps; or to so many groups of warps, each of which shares kernel rows as `parts`.
template <class Traits>
struct ToeplitzSlot {
  int channel, slots, slot, part = 0;

  __device__ __forceinline__ ToeplitzSlot(const DirectArgs& args, const ToeplitzNhwcTiling& tiling) {
    const int channels = Traits::kPaired ? ptx::opaque(Traits::kChannels) : block_channels<Traits>(args);
    const int warp = ptx::thread_index() / 32;
    const bool all = Traits::kPaired || channels == Traits::kChannels;
    slots = all ? Traits::kSlots : tiling.rest_slots;
    slot = all ? warp / Traits::kChannels : tiling.rest_divider.quotient(warp);
    channel = warp - slot * channels;
    if constexpr (Traits::kShared) {
      const int warp_slot = slot;
      slots = tiling.part_divider.quotient(slots), slot = tiling.part_divider.quotient(warp_slot);
      part = warp_slot - slot * tiling.parts;
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    toeplitz_nhwc_kernel(const __grid_constant__ DirectArgs args, const __grid_constant__ ToeplitzNhwcTiling tiling) {
  using T = typename Traits::T;
  using Unit = ToeplitzUnit<Traits>;
  using Slot = ToeplitzSlot<Traits>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (Traits::kSinceSm80) return;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  if constexpr (Traits::kPaired) return;
#endif
  extern __shared__ __align__(16) unsigned char shared_memory[];
  // What a unit is takes no registers while products are added up.
  __shared__ Unit units[4];
  Unit &now = units[0], &next = units[1], &later = units[2], &stored = units[3];
  const int channel_pairs = args.kernel_h * Traits::kBand;
  unsigned* const pairs = reinterpret_cast<unsigned*>(shared_memory);
  // What is derived from these is opaque, and found anew too.
  const auto tile = [&] {
    return reinterpret_cast<T*>(pairs + ptx::opaque(args.kernel_h) * (Traits::kChannels * Traits::kBand));
  };
  const auto pixels = [&] { return tile() + (tiling.tile + Traits::kPitch + 1) * kChunk; };
  const auto zeros = [&] { return shared_memory + Traits::kChannels * channel_pairs * 4 + tiling.tile * kChunkBytes; };
  // The filters as they lie; kShared: in a room of their own, later that of the sums of shared tiles.
  const auto filters = [&] { return Traits::kShared ? pixels() + tiling.pixels * kChunk : tile(); };

  // Threads from here on fetch pixels: those of the first eight warps, where there are more, lay out weights at first, and
  // later have more tiles, if any have.
  constexpr int kFirst = Traits::kWarps > Traits::kChannels ? 32 * Traits::kChannels : 0;
  {
    const int warp = threadIdx.x / 32, channels = block_channels<Traits>(args);
    const auto filter = [&](int channel) { return filters() + channel * filter_chunks(args) * kChunk; };
    const auto lay_out = [&](int channel, int first_row, int row_step) {
      const T* const taps = filter(channel) + filter_offset<Traits>(args, first_channel<Traits>() + channel);
      lay_out_weights<Traits>(pairs + channel * channel_pairs, args, first_row, row_step,
                              [&](int tap) -> unsigned { return taps[tap].bits; });
    };
    if (warp < channels) fetch_filter<Traits>(filter(warp), args, first_channel<Traits>() + warp);
    commit_copies();
    constexpr int kFirstNow = Traits::kShared ? 0 : kFirst;
    if (const int worker = static_cast<int>(threadIdx.x) - kFirstNow; worker >= 0) {
      Unit unit;
      unit.find(args, tiling, tiling.first_item(blockIdx.y));
      if (tiling.ahead) fetch_pixels<Traits>(pixels(), args, tiling, unit, worker, Traits::kThreads - kFirstNow);
      if (Traits::kShared && !tiling.ahead) load_pixels<Traits>(tile(), args, tiling, unit);
      if (worker <= Traits::kPitch) reinterpret_cast<uint4*>(zeros())[worker] = uint4{};
      if (worker == 0) {
        now = unit;
        next.find(args, tiling, unit.item + unit.items);
      }
    }
    commit_copies();
    wait_for_copies<1>();
    if constexpr (Traits::kShared) {
      __syncthreads();
      if (const Slot at(args, tiling); at.slot < at.slots)
        lay_out(at.channel, at.slot * tiling.parts + at.part, at.slots * tiling.parts);
    } else {
      __syncwarp();
      if (warp < channels) lay_out(warp, 0, 1);
    }
  }
  __syncthreads();

#pragma unroll 1
  while (now.items > 0) {
    wait_for_all_copies();
    if (tiling.ahead)
      turn_pixels<Traits>(tile(), pixels(), now.in_rows, tiling.plane);
    else if (!Traits::kShared || now.item > tiling.first_item(blockIdx.y))
      load_pixels<Traits>(tile(), args, tiling, now);
    __syncthreads();
    // The other warps keep the tensor cores busy.
    if (const int worker = ptx::thread_index() - kFirst; tiling.ahead && worker >= 0 && next.items > 0)
      fetch_pixels<Traits>(pixels(), args, tiling, next, worker, Traits::kThreads - kFirst);
    if (ptx::thread_index() == 0) {
      stored = now;
      later.find(args, tiling, next.item + next.items);
    }

    ToeplitzSums<Traits> sum;
    {
      const Slot at(args, tiling);
      const float first = at.part == 0 ? bias_of<Traits>(args, first_channel<Traits>() + at.channel) : 0.f;
      ToeplitzRows<Traits> rows(args, now, tile() + at.channel * tiling.plane * kChunk, ptx::shared_address(zeros()),
                                tiling.row_divider, now.rows, args.h, at.slot, at.slots);
      if constexpr (Traits::kShared) rows.take_part(at.part, tiling.part_divider);
      start_sums(sum, first);
      multiply_rows<Traits>(sum, rows, args, pairs + at.channel * channel_pairs);
      if constexpr (Traits::kShared) {
        if (tiling.parts > 1)
          add_parts<Traits>(sum, reinterpret_cast<float4*>(filters()), rows.tiles, at.channel * at.slots + at.slot,
                            at.part, tiling.parts, /*held_tiles=*/1);
      }
    }

    const bool poisoned = __syncthreads_or(has_nan(sum));
    if (ptx::thread_index() == 0) now = next, next = later;
    if (const Slot at(args, tiling); at.slot < at.slots && at.part == 0) {
      T* const to = tile() + at.channel * tiling.stage * kChunk + 2 * (ptx::lane_index() % 4);
      for_each_row<Traits>(sum, at.slot, at.slots, stored.rows, [&](int row, auto&& pair) {
#pragma unroll
        for (int n = 0; n < Traits::kTilesW; ++n)
          *reinterpret_cast<unsigned*>(to + (row * Traits::kStagePitch + n) * kChunk) = pair(n);
      });
    }
    if constexpr (Traits::kPaired) ptx::arrive_relaxed_at_cluster_barrier();
    __syncthreads();
    if (poisoned) {
      mend_outputs<Traits>(tile(), args, tiling, stored);
      __syncthreads();
    }
    if constexpr (Traits::kPaired) {
      const ToeplitzPair<Traits> pair(stored);
      const T* const inbox = tile() + Traits::kChannels * tiling.stage * kChunk;
      ptx::wait_at_cluster_barrier();
      pair.send(tile(), tiling, inbox);
      ptx::arrive_at_cluster_barrier();
      ptx::wait_at_cluster_barrier();
      pair.store(tile(), args, tiling, stored, inbox);
    } else {
      store_pixels<Traits>(tile(), args, tiling, stored);
    }
  }
}

// Whether blocks work in pairs: where each has channels of its own.
template <class Traits>
bool stores_in_pairs(const DirectArgs& args) {
  return args.out_c % (2 * Traits::kChannels) == 0 && copy_width(args.out, args.out_c) == kChunk &&
         device_limits().clusters && compiled_architecture(toeplitz_nhwc_kernel<Traits>) == 90;
}

template <class Traits>
int launch_units(const DirectArgs& args, cudaStream_t stream) {
  constexpr int kUnitBytes = 4 * sizeof(ToeplitzUnit<Traits>);
  constexpr int kMostInRows = 1 << 12, kMostRounds = 3;  // more rows find no room anywhere
  const DeviceLimits& device = device_limits();
  // Blocks have as little as that before sm_80 alone.
  if (Traits::kSinceSm80 && device.shared_bytes_block <= 64 << 10) return kBeforeSm80;
  const int pair_bytes = Traits::kChannels * args.kernel_h * Traits::kBand * 4;
  const int filters = Traits::kChannels * filter_chunks(args);
  const int groups = divide_up(static_cast<int>(args.out_c), Traits::kChannels);
  const int tiles_w = divide_up(args.out_w, Traits::kColumns);
  ToeplitzNhwcTiling tiling{}, best{};
  if (const int rest = static_cast<int>(args.out_c % Traits::kChannels); rest > 0) {
    tiling.rest_slots = Traits::kWarps / rest;
    tiling.rest_divider = SmallDivider(rest);
  }
  const int slots = Traits::kShared ? tiling.rest_slots : Traits::kSlots, most_items = slots * Traits::kTilesH;
  // Offsets within a unit are 32-bit numbers.
  const int64_t most_rows = min_int64(kMostInRows, kInt32Max / (max_int64(args.w, args.out_w) * args.out_c));
  tiling.row_divider = IntDivider(args.out_h);
  tiling.in_vector = copy_width(args.input, args.out_c);
  tiling.out_vector = copy_width(args.out, args.out_c);

  const auto shared_bytes = [&](int in_rows) {
    const int in_chunks = in_rows * Traits::kPitch;
    tiling.plane = plane_chunks(in_chunks);
    tiling.stage = plane_chunks(tiling.merged * kTileRows * Traits::kStagePitch);
    const int inbox = Traits::kPaired ? tiling.merged * ToeplitzPair<Traits>::kInboxChunks : 0;  // behind the outputs
    tiling.tile = max_int(filters, max_int(Traits::kChannels * tiling.plane, Traits::kChannels * tiling.stage + inbox));
    tiling.pixels = tiling.ahead ? divide_up(in_chunks, kTurned) * kTurned * kChunk : 0;
    int room = 0;
    if constexpr (Traits::kShared) {
      tiling.parts = max_int(1, slots / tiling.merged);
      const int tiles = static_cast<int>(args.out_c) * (slots / tiling.parts);
      room = max_int(filters, tiles * (tiling.parts - 1) * Traits::kTilesW * 32);
    }
    return pair_bytes + (tiling.tile + Traits::kPitch + 1 + tiling.pixels + room) * kChunkBytes;
  };
  // Cycles of the multiprocessor that takes longest: of so many blocks one after the other, or two at a time.
  const auto cost = [&](int in_rows, int rounds, int resident) {
    // A product of K = 16 takes six cycles of a partition's tensor cores; one warp alone keeps them busy for less than half
    // of the time.
    constexpr float kItemCycles = Traits::kTilesW * Traits::kChunks * 2.7f, kBusy = 0.8f, kAlone = 0.4f;
    constexpr float kBlockCycles = 6000, kUnitCycles = 1500, kWaitCycles = 2000, kChunkCycles = 6, kLoadedCycles = 14;
    constexpr float kBeside = 0.6f;  // two blocks at a time, of the time that they take one after the other
    const int channels = min_int(Traits::kChannels, static_cast<int>(args.out_c));
    const int parts = Traits::kShared ? tiling.parts : 1;
    const auto products = [&](int items) {
      const float all = items * channels / (kPartitions * kBusy);
      const float one = divide_up(items, slots / parts) / (kAlone * parts);
      return args.kernel_h * kItemCycles * (all > one ? all : one);
    };
    const int items = tiling.share + (tiling.longer > 0 ? 1 : 0);
    const int merged = tiling.image_items > 0 ? min_int(tiling.merged, tiling.image_items) : tiling.merged;
    const int units = divide_up(items, merged);
    const int large = divide_up(items, units), small = items / units, larger = items - small * units;
    const float chunks = static_cast<float>(in_rows) * Traits::kPitch;
    const float unit = kUnitCycles + (tiling.ahead ? kChunkCycles * chunks * (kChunk / tiling.in_vector)
                                                   : kWaitCycles + kLoadedCycles * chunks);
    const float turns = resident > 1 && rounds > 1 ? divide_up(rounds, 2) * 2 * kBeside : rounds;
    return turns *
           (kBlockCycles + kWaitCycles + units * unit + larger * products(large) + (units - larger) * products(small));
  };

  float least = 0;
  int bytes = 0, best_parts = 0;
  for (const bool all : {true, false}) {
    if (all && (Traits::kTurned || args.n * args.out_h > kInt32Max / 2)) continue;
    tiling.image_items = all ? 0 : divide_up(args.out_h, kTileRows);
    const int64_t items = all ? divide_up<int64_t>(args.n * args.out_h, kTileRows) : args.n * tiling.image_items;
    tiling.items = static_cast<int>(items);
    for (const bool ahead : {true, false}) {
      if (ahead && tiling.in_vector == 1) continue;  // two bytes are no asynchronous copy
      tiling.ahead = ahead;
      for (tiling.merged = most_items; tiling.merged > 0; --tiling.merged) {
        const int64_t in_rows = toeplitz_in_rows(args, tiling.merged * kTileRows, all);
        if (in_rows > most_rows || tiling.merged * kTileRows > most_rows) continue;
        const int needed = shared_bytes(static_cast<int>(in_rows));
        if (needed + kUnitBytes > device.shared_bytes_block) continue;
        for (int rounds = 1; rounds <= kMostRounds; ++rounds) {
          const int64_t all_items = items * tiles_w;
          const int most_parts = max_int(1, rounds * device.multiprocessors / groups);
          const int parts = static_cast<int>(all_items < most_parts ? all_items : most_parts);
          tiling.share = static_cast<int>(all_items / parts), tiling.longer = static_cast<int>(all_items % parts);
          const int resident = needed + kUnitBytes <= device.shared_bytes_for(2) ? Traits::kMinBlocks : 1;
          const float cycles =
              cost(static_cast<int>(in_rows), divide_up(groups * parts, device.multiprocessors), resident);
          if (bytes == 0 || cycles < least) least = cycles, best = tiling, best_parts = parts, bytes = needed;
        }
      }
    }
  }
  if (bytes == 0) return kTooLittleSharedMemory;
  if (best.image_items == 0) {  // evenly
    const int items = best.share + (best.longer > 0 ? 1 : 0);
    best.merged = divide_up(items, divide_up(items, best.merged));
  }
  if (Traits::kShared) best.part_divider = SmallDivider(best.parts);
  best.items_divider = IntDivider(best.items);
  if (best.image_items > 0) best.image_divider = IntDivider(best.image_items);

  const auto kernel = toeplitz_nhwc_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes, kUnitBytes)) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = Traits::kPaired ? 2 : 1, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  // Blocks that run together read whole pixels together.
  config.gridDim = dim3(static_cast<unsigned>(groups), static_cast<unsigned>(best_parts));
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = Traits::kPaired ? 1 : 0;
  const int error = cudaLaunchKernelEx(&config, kernel, args, best);
  cudaGetLastError();  // forgets the error, which would be the next launch's
  return error;
}

template <class Traits>
int launch_toeplitz_nhwc(const DirectArgs& lying, cudaStream_t stream) {
  const DirectArgs args = Traits::kTurned ? turned(lying) : lying;
  if constexpr (!Traits::kShared) {
    using Paired = PairedToeplitzTraits<Traits>;
    const int answer = stores_in_pairs<Paired>(args) ? launch_units<Paired>(args, stream) : kTooLittleSharedMemory;
    if (!is_refusal(answer)) return answer;
  }
  return launch_units<Traits>(args, stream);
}

}  // namespace depthwise
