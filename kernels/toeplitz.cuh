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
// Owns    NCHW: a block computes a rectangle of outputs of one channel of one image, or of several small images.
//         channels_last: toeplitz_nhwc.cuh. A warp holds kTilesH x 16 rows by kTilesW x 8 columns of outputs; its rows are
//         counted through all images of the block, so that small images waste none.
// Memory  per channel kernel_h * (8 * kChunks + 7 * stride - 1) words of weights, each a pair of neighbours as B wants
//         it; the input rows inside the image in chunks of 16 bytes, an odd number a row (ldmatrix without bank
//         conflicts), one row of zeros that stands for all rows outside. The outputs reuse the input's room. 31x31
//         on four images of 56x56: 5.7 KB + 25.2 KB.
// NaN     A zero of the band times an infinity or NaN gives NaN in outputs that do not see it. So where a block finds a
//         NaN it computes those outputs again with plain multiply-adds over their own taps.
// Chosen  select.h.
#pragma once

#include "toeplitz_nhwc.cuh"
#include "toeplitz_products.cuh"

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
  const int tile_rows = block.images * block.in_rows;

  for (int k = threadIdx.x; k <= (tile_rows + 1) * Traits::kPitch; k += Traits::kThreads)
    reinterpret_cast<uint4*>(tile)[k] = uint4{};
  __syncthreads();
  const int image_pitch = block.in_rows * Traits::kPitch * kChunk;
  switch (tiling.in_vector) {
    case 8: load_nchw<8, Traits>(tile, args, block, image_pitch); break;
    case 4: load_nchw<4, Traits>(tile, args, block, image_pitch); break;
    case 2: load_nchw<2, Traits>(tile, args, block, image_pitch); break;
    default: load_nchw<1, Traits>(tile, args, block, image_pitch);
  }
  load_weights<Traits>(pairs, args, block);
  wait_for_all_copies();

  // Tiles are dealt to the warps from where those of the block before it on the same multiprocessor end, so that its
  // partitions have as many.
  const int block_tiles = divide_up(block.images * block.rows, kTileRows);
  const unsigned tiles_before = blockIdx.x / static_cast<unsigned>(tiling.round) * block_tiles;
  const int first = static_cast<int>((threadIdx.x / 32 - tiles_before) % Traits::kWarps);
  const ToeplitzRows<Traits> rows(args, block, tile, ptx::shared_address(tile + tile_rows * Traits::kPitch * kChunk),
                                  tiling.row_divider, block.images * block.rows, block.in_rows, first, Traits::kWarps);
  ToeplitzSums<Traits> sum;
  start_sums(sum, args.bias ? load(static_cast<const T*>(args.bias) + block.channel) : 0.f);
  multiply_rows<Traits>(sum, rows, args, pairs);

  // Stage the outputs where the input was.
  const bool poisoned = __syncthreads_or(has_nan(sum));
  const int lane = threadIdx.x % 32;
  const ToeplitzOutputs<Traits> stage(args, tiling, block);
  if (tiling.out_vector == kChunk) {
    for_each_row<Traits>(sum, first, Traits::kWarps, block.images * block.rows, [&](int flat, auto&& pair) {
      T* to = tile + flat * Traits::kStagePitch * kChunk + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < Traits::kTilesW; ++n) *reinterpret_cast<unsigned*>(to + n * kChunk) = pair(n);
    });
    __syncthreads();
    store_aligned<Traits>(tile, stage, args, block, poisoned);
  } else {
    const bool by_twos = tiling.out_vector > 1;
    for_each_row<Traits>(sum, first, Traits::kWarps, block.images * block.rows, [&](int flat, auto&& pair) {
      const int image = flat / block.rows, column = 2 * (lane % 4);
      T* to = tile + stage.offset(image, flat - image * block.rows) + column;
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
int launch_toeplitz_nchw(const DirectArgs& args, cudaStream_t stream) {
  constexpr int kFlatRows = Traits::kWarps * Traits::kTilesH * kTileRows;
  const DeviceLimits& device = device_limits();
  ToeplitzTiling tiling{};
  tiling.round = device.multiprocessors;
  tiling.row_divider = IntDivider(args.out_h);
  tiling.tiles_w = divide_up(args.out_w, Traits::kColumns);
  tiling.in_vector = copy_width(args.input, args.w);
  tiling.out_vector = copy_width(args.out, args.out_w);
  const int stage_pitch = tiling.out_vector == kChunk ? Traits::kStagePitch : Traits::kTilesW + 1;
  const auto shared_bytes = [&] {
    const int in_rows = min_int(args.h, (tiling.rows - 1) * args.stride_h + (args.kernel_h - 1) * args.dilation_h + 1);
    const int in_chunks = (tiling.images * in_rows + 1) * Traits::kPitch + 1;  // a pair of chunks may end behind a row
    return divide_up(args.kernel_h * Traits::kBand, 4) * 16 +
           16 * max_int(in_chunks, tiling.images * tiling.rows * stage_pitch);
  };

  // Several whole images, or as many rows of one as the warps hold and shared memory takes.
  const int images = static_cast<int>(args.n), roomy = device.shared_bytes_for(2);
  const auto blocks = [&] {
    return args.out_c * divide_up(images, tiling.images) * tiling.tiles_w * divide_up(args.out_h, tiling.rows);
  };
  const auto even = [](int all, int most) { return divide_up(all, divide_up(all, most)); };
  tiling.rows = even(args.out_h, kFlatRows);
  tiling.images = max_int(1, min_int(images, kFlatRows / args.out_h));
  while (tiling.images > 1 && shared_bytes() > roomy) tiling.images = divide_up(tiling.images, 2);
  tiling.images = even(images, tiling.images);
  // Few blocks: fewer images or rows each, where that leaves less to the partition of a multiprocessor that has most.
  if (blocks() < 2 * tiling.round) {
    const auto cost = [&] {  // in thirds of a tile's products; a block costs some, beside its tiles'
      const int64_t rounds = divide_up<int64_t>(blocks(), tiling.round);
      const int tiles = divide_up(tiling.images * tiling.rows, kTileRows);
      return 3 * divide_up<int64_t>(rounds * tiles, kPartitions) + 2 * rounds;
    };
    ToeplitzTiling best = tiling;
    int64_t least = cost();
    const auto consider = [&] {
      if (cost() < least) least = cost(), best = tiling;
    };
    for (int most = tiling.images - 1; most > 0; --most) tiling.images = even(images, most), consider();
    for (int most = tiling.rows - kTileRows; most > 0; most -= kTileRows)
      tiling.rows = even(args.out_h, most), consider();
    tiling = best;
  }
  while (tiling.rows > kTileRows && shared_bytes() > roomy) tiling.rows = divide_up(tiling.rows, 2);
  tiling.tiles_h = divide_up(args.out_h, tiling.rows);

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
