// Depthwise convolution as products with banded (Toeplitz) matrices on the tensor cores: forward, and grad of input at
// stride 1 (filter flipped). NCHW and channels_last, fp16 and bf16, fp32 accumulators.
//
// Idea    One kernel row, for eight neighbouring outputs of a row, is a banded matrix,
//         B[k][n] = w[shift + k - n * stride], times A[m][k], sixteen output rows m of the input at columns k. The band
//         spans kChunks chunks of eight input columns, so of the multiplies kernel_w / (8 * kChunks) are useful: 7/24
//         for 7x7, 31/40 for 31x31. Where one block spans the image's rows, products whose input columns all lie
//         outside the image are left out.
// Serves  any kernel height, padding, dilation and stride of rows at run time; compile-time are the type, kChunks, the
//         stride of columns, and where the image lies in the block's chunks (in wide images: nothing of it), so that a
//         specialisation serves many kernels.
// Order   tensor cores truncate, so that sums of many products drift towards zero while they are far from it. Kernel rows are
//         taken some rows apart (Traits::kApart), lest an edge filter on an image of one sign builds up a large sum before it
//         undoes it; and the sums of tall kernels are added up in parts (kTall).
// Turned  kernels much taller than wide, at stride 1: rows are taken for columns and columns for rows, so that fewer products
//         make a sum (NCHW: toeplitz_turned.cuh; channels_last: pixel_at).
// Owns    NCHW: a block computes rows of outputs of one channel, counted through all images, so that small images waste
//         none. channels_last: toeplitz_nhwc.cuh. A warp holds kTilesH x 16 rows by kTilesW x 8 columns of outputs. Where
//         there are few tiles, several warps share one: each takes some of the kernel rows, and the first adds up the sums
//         of all, in order, through shared memory. For a warp that has a partition to itself starts a product every 14
//         cycles, two together one every 8 (H100).
// Memory  per channel kernel_h * (8 * kChunks + 7 * stride - 1) words of weights, each a pair of neighbours as B wants
//         it; the input rows inside the image in chunks of 16 bytes, an odd number a row (ldmatrix without bank
//         conflicts), one row of zeros that stands for all rows outside; sums of shared tiles. The outputs reuse the
//         input's room. 31x31 on four images of 56x56: 5.7 KB + 25.2 KB.
// Small   problems take as long as the chain from a block's launch to its stores: nothing is divided before the first
//         asynchronous copy, and while they are under way what they leave out is set to zero and weights come to the L2
//         cache (H100, us, weights laid out first: 31x31, 32x128x56x56: 69.0, 71.4; 64x3x56x56: 10.9, 11.5; 64x1x56x56: 7.4,
//         7.7).
// NaN     A zero of the band times an infinity or NaN gives NaN in outputs that do not see it. So where a block finds a
//         NaN it computes those outputs again with plain multiply-adds over their own taps.
// Chosen  select.h.
#pragma once

#include "toeplitz_nhwc.cuh"
#include "toeplitz_products.cuh"
#include "toeplitz_turned.cuh"

namespace depthwise {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    toeplitz_kernel(const __grid_constant__ DirectArgs args, const ToeplitzTiling tiling) {
  using T = typename Traits::T;
  static_assert(!Traits::kChannelsLast);
  const ToeplitzBlock<Traits> block(args, tiling);

  // Shared memory: weights, input rows of every image, a row of zeros.
  extern __shared__ __align__(16) unsigned char shared_memory[];
  unsigned* pairs = reinterpret_cast<unsigned*>(shared_memory);
  T* tile = reinterpret_cast<T*>(pairs + divide_up(args.kernel_h * Traits::kBand, 4) * 4);
  const LoadedRows loaded{0, args.h, block.in_row, block.in_rows};
  const int taps = args.kernel_h * args.kernel_w;
  prefetch_rows(filters_of<Traits>(args, block.channel, taps), 0, 1, taps);
  if constexpr (Traits::kTurned)
    load_turned(tile, tile + ((block.in_rows + 1) * Traits::kPitch + 1) * kChunk, args, block,
                tiling.in_vector == kChunk);
  else
    with_vector(tiling.in_vector, [&](auto vector) { load_nchw<vector.value, Traits>(tile, args, block, loaded, 0); });
  zero_beside(tile, block, block.in_rows, Traits::kTurned || tiling.in_vector == 1);

  // Tiles are dealt to the warps from where those of the block before it on the same multiprocessor end, so that its
  // partitions have as many; a tile to several warps, if need be, which share its kernel rows.
  const int part_bits = tiling.part_bits, parts = 1 << part_bits, step = Traits::kWarps >> part_bits;
  const unsigned tiles_before = blockIdx.x / static_cast<unsigned>(tiling.round) * divide_up(tiling.rows, kTileRows)
                                << part_bits;
  const int warp = static_cast<int>((threadIdx.x / 32 - tiles_before) % Traits::kWarps);
  const int first = warp >> part_bits, part = warp & (parts - 1);
  ToeplitzRows<Traits> rows(args, block, tile, ptx::shared_address(tile + block.in_rows * Traits::kPitch * kChunk),
                            tiling.row_divider, block.rows, args.h, first, step);
  rows.take_part(part, tiling.part_divider);
  load_weights<Traits>(pairs, args, block);
  ToeplitzSums<Traits> sum;
  start_sums(sum, part == 0 ? bias_of<Traits>(args, block.channel) : 0.f);
  wait_for_all_copies();
  multiply_rows<Traits>(sum, rows, args, pairs);
  if (parts > 1)
    add_parts<Traits>(sum, reinterpret_cast<float4*>(tile) + (block.in_rows + 1) * Traits::kPitch + 1, rows.tiles,
                      first, part, parts, tiling.held_tiles);

  const bool poisoned = __syncthreads_or(part == 0 && has_nan<4>(sum));
  if constexpr (Traits::kTurned) {
    stage_turned<Traits>(tile, sum, tiling, first, step, part == 0 ? block.rows : 0);
    __syncthreads();
    with_vector(tiling.out_vector, [&](auto vector) { store_turned<vector.value, Traits>(tile, args, tiling, block); });
    if (poisoned) {
      __syncthreads();
      mend_turned<Traits>(args, tiling);
    }
    return;
  }
  // Stage the outputs where the input was.
  const int lane = threadIdx.x % 32;
  const ToeplitzOutputs<Traits> stage(args, tiling, block);
  const int staged_rows = part == 0 ? block.rows : 0;
  if (tiling.out_vector == kChunk) {
    for_each_row<Traits>(sum, first, step, staged_rows, [&](int flat, auto&& pair) {
      T* to = tile + flat * Traits::kStagePitch * kChunk + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n) *reinterpret_cast<unsigned*>(to + n * kChunk) = pair(n);
    });
    __syncthreads();
    store_aligned<Traits>(tile, stage, args, block, poisoned);
  } else {
    const bool by_twos = tiling.out_vector > 1;
    for_each_row<Traits>(sum, first, step, staged_rows, [&](int flat, auto&& pair) {
      const int column = 2 * (lane % 4);
      T* to = tile + stage.offset(block.row + flat) + column;
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n, to += kChunk) {
        const unsigned two = pair(n);
        const int columns = block.columns - n * kChunk - column;
        if (by_twos && columns > 0) *reinterpret_cast<unsigned*>(to) = two;
        if (!by_twos && columns > 0) to[0].bits = static_cast<unsigned short>(two);
        if (!by_twos && columns > 1) to[1].bits = static_cast<unsigned short>(two >> 16);
      }
    });
    __syncthreads();
    store_runs<Traits>(tile, stage, args, block, poisoned);
  }
}

template <class Traits>
int launch_toeplitz_nchw(const DirectArgs& lying, cudaStream_t stream) {
  const DirectArgs args = Traits::kTurned ? turned(lying) : lying;
  constexpr int kFlatRows = Traits::kWarps * Traits::kTilesH * kTileRows;
  const DeviceLimits& device = device_limits();
  ToeplitzTiling tiling{};
  tiling.round = device.multiprocessors;
  tiling.row_divider = IntDivider(args.out_h);
  tiling.tiles_w = divide_up(args.out_w, Traits::kColumns);
  tiling.tiles_w_divider = IntDivider(tiling.tiles_w), tiling.channel_divider = IntDivider(args.out_c);
  tiling.in_vector = copy_width(args.input, lying.w);
  tiling.out_vector = copy_width(args.out, lying.out_w);
  const int64_t all_rows = args.n * args.out_h;
  const auto shared_bytes = [&] {
    const int in_rows = static_cast<int>(toeplitz_in_rows(args, tiling.rows, true));
    const int in_chunks = (in_rows + 1) * Traits::kPitch + 1;  // a pair of chunks may end behind a row
    // Outputs take the input's place, but not that of the sums of tiles which several warps share.
    const int slots = Traits::kWarps >> tiling.part_bits;
    const int held = divide_up(divide_up(tiling.rows, kTileRows), slots);
    const int sums = (Traits::kWarps - slots) * held * Traits::kTilesW * 32;
    const int corners = Traits::kTurned ? Traits::kWarps * kCornerChunks : 0;  // before there are sums
    const bool whole = tiling.tiles_w == 1;
    const int run = whole ? min_int(tiling.rows, args.out_h) * args.out_w : Traits::kColumns;
    const int runs = whole ? divide_up(tiling.rows - 1, args.out_h) + 1 : tiling.rows;
    const int staged = Traits::kTurned               ? Traits::kColumns * turned_pitch(tiling.rows)
                       : tiling.out_vector == kChunk ? tiling.rows * Traits::kStagePitch
                                                     : runs * divide_up(run + kChunk - 1, kChunk);
    return divide_up(args.kernel_h * Traits::kBand, 4) * 16 + 16 * max_int(in_chunks + max_int(sums, corners), staged);
  };
  const auto blocks = [&] { return args.out_c * divide_up(all_rows, tiling.rows) * tiling.tiles_w; };
  const int roomy = device.shared_bytes_for(2);

  // As many rows as the warps hold and shared memory takes. us, H100, fp16: 31x31, 8x40x96x96: 256 rows 29.4, 192 33.0, 128
  // 31.9; 27x27, 32x40x33x47: 176 22.0, 212 24.8; 31x31, 64x3x56x56: 32 in two parts 11.6, 96 11.7, 128 12.3; 64x1x56x56:
  // 32 in four parts 8.3, in two 8.6, a whole image in two 9.2.
  // Turned, whole words of outputs, which are eight rows of the block.
  const auto whole = [](int64_t rows) {
    return static_cast<int>(Traits::kTurned ? divide_up<int64_t>(rows, kChunk) * kChunk : rows);
  };
  const auto even = [&](int64_t all, int most) { return whole(divide_up(all, divide_up<int64_t>(all, most))); };
  tiling.rows = even(all_rows, kFlatRows);
  // Few blocks: fewer rows each, and several warps a tile, as it takes the fewest cycles.
  if (blocks() < 2 * tiling.round) {
    const auto cost = [&] {
      // A tile and a kernel row; a warp that has a partition to itself keeps it busy for half of the time.
      constexpr int kTapCycles = Traits::kTilesW * Traits::kChunks * 3, kAlone = 2;
      constexpr int kRoundCycles = 2000, kBlockCycles = 300, kPartsCycles = 200;
      const int parts = 1 << tiling.part_bits, tiles = divide_up(tiling.rows, kTileRows);
      const int64_t share = divide_up<int64_t>(blocks(), tiling.round);
      const int64_t rounds = divide_up<int64_t>(share, Traits::kMinBlocks);
      const int64_t busy = divide_up<int64_t>(share * tiles * parts, kPartitions);
      const int64_t alone = kAlone * rounds * divide_up(tiles, Traits::kWarps / parts);
      return args.kernel_h * kTapCycles * (busy > alone ? busy : alone) / parts + kRoundCycles * rounds +
             (kBlockCycles + (parts > 1 ? kPartsCycles : 0)) * share;
    };
    ToeplitzTiling best = tiling;
    int64_t least = cost();
    const auto consider = [&] {
      for (tiling.part_bits = 0; 1 << tiling.part_bits <= Traits::kWarps; ++tiling.part_bits) {
        if (tiling.rows > (Traits::kWarps >> tiling.part_bits) * Traits::kTilesH * kTileRows) break;
        if (cost() < least && shared_bytes() <= roomy) least = cost(), best = tiling;
      }
      tiling.part_bits = 0;
    };
    for (int tiles = kFlatRows / kTileRows; tiles > 0; --tiles)
      if (tiles * kTileRows < all_rows + kTileRows) tiling.rows = even(all_rows, tiles * kTileRows), consider();
    tiling = best;
  }
  while (tiling.rows > kTileRows && shared_bytes() > roomy) tiling.rows = whole(divide_up(tiling.rows, 2));
  tiling.part_divider = SmallDivider(1 << tiling.part_bits);
  tiling.held_tiles = divide_up(divide_up(tiling.rows, kTileRows), Traits::kWarps >> tiling.part_bits);

  const int bytes = shared_bytes();
  if (bytes > device.shared_bytes_block) return kTooLittleSharedMemory;
  const auto kernel = toeplitz_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  kernel<<<static_cast<unsigned>(blocks()), Traits::kThreads, bytes, stream>>>(args, tiling);
  return cudaGetLastError();
}

template <class Traits>
int launch_toeplitz(const DirectArgs& args, int, cudaStream_t stream) {
  if constexpr (Traits::kChannelsLast)
    return launch_toeplitz_nhwc<Traits>(args, stream);
  else
    return launch_toeplitz_nchw<Traits>(args, stream);
}

}  // namespace depthwise
