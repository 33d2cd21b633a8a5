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
//         channels_last: of eight channels, one a warp. A warp holds kTilesH x 16 rows by kTilesW x 8 columns of
//         outputs; its rows are counted through all images of the block, so that small images waste none.
// Memory  per channel kernel_h * (8 * kChunks + 7 * stride - 1) words of weights, each a pair of neighbours as B wants
//         it; the input rows inside the image in chunks of 16 bytes, an odd number a row (ldmatrix without bank
//         conflicts), one row of zeros that stands for all rows outside. The outputs reuse the input's room. 31x31
//         on four images of 56x56: 5.7 KB + 32.4 KB.
// NaN     A zero of the band times an infinity or NaN gives NaN in outputs that do not see it. So where a block finds a
//         NaN it computes those outputs again with plain multiply-adds over their own taps.
// Chosen  select.h.
#pragma once

#include "toeplitz_block.cuh"

namespace depthwise {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    toeplitz_kernel(const __grid_constant__ DirectArgs args, const ToeplitzTiling tiling) {
  using T = typename Traits::T;
  constexpr int kTilesW = Traits::kTilesW, kTilesH = Traits::kTilesH, kChunks = Traits::kChunks,
                kStrideW = Traits::kStrideW;
  const ToeplitzBlock<Traits> block(args, tiling);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Shared memory: weights, input rows of every channel and image, a row of zeros.
  extern __shared__ __align__(16) unsigned char shared_memory[];
  unsigned* pairs = reinterpret_cast<unsigned*>(shared_memory);
  const int pair_words = divide_up(Traits::kChannels * args.kernel_h * Traits::kBand, 4) * 4;
  T* tile = reinterpret_cast<T*>(pairs + pair_words);
  const int tile_rows = Traits::kChannels * block.images * block.in_rows;

  for (int k = threadIdx.x; k < (tile_rows + 1) * Traits::kPitch; k += Traits::kThreads)
    reinterpret_cast<uint4*>(tile)[k] = uint4{};
  __syncthreads();
  if constexpr (Traits::kChannelsLast) {
    load_nhwc<Traits>(tile, args, block, tiling.in_vector == kChannelsNhwc);
  } else {
    const int image_pitch = block.in_rows * Traits::kPitch * kChunk;
    switch (tiling.in_vector) {
      case 8: load_nchw<8, Traits>(tile, args, block, image_pitch); break;
      case 4: load_nchw<4, Traits>(tile, args, block, image_pitch); break;
      case 2: load_nchw<2, Traits>(tile, args, block, image_pitch); break;
      default: load_nchw<1, Traits>(tile, args, block, image_pitch);
    }
  }
  load_weights<Traits>(pairs, args, block);
  wait_for_all_copies();

  // Which rows: lane l names row l % 16 of each tile to ldmatrix; the rows outside the image are the row of zeros.
  const int channel = Traits::kChannelsLast ? warp : 0;  // of the block's
  // NCHW: tiles are dealt to the warps from where those of the block before it on the same multiprocessor end, so that its
  // partitions have as many.
  const int block_tiles = divide_up(block.images * block.rows, kTileRows);
  const unsigned tiles_before = blockIdx.x / static_cast<unsigned>(tiling.round) * block_tiles;
  const int first_tile = Traits::kChannelsLast ? 0 : static_cast<int>((warp - tiles_before) % Traits::kWarps);
  constexpr int kTileStep = Traits::kChannelsLast ? 1 : Traits::kWarps;
  constexpr int kRowBytes = Traits::kPitch * kChunk * sizeof(T);
  const unsigned base = ptx::shared_address(tile) + lane / kTileRows * 16;
  const unsigned zeros = base + tile_rows * kRowBytes;
  int in_row[kTilesH];
  unsigned address[kTilesH];
  int first_tap = args.kernel_h, end_tap = 0;  // kernel rows that meet the image anywhere in this warp
#pragma unroll
  for (int a = 0; a < kTilesH; ++a) {
    const int flat = (first_tile + a * kTileStep) * kTileRows + lane % kTileRows;
    const int image = flat / block.rows;
    const bool exists = image < block.images && channel < block.channels;
    in_row[a] = exists ? (block.row + flat - image * block.rows) * args.stride_h - args.padding_h : kOutside;
    address[a] = base + ((channel * block.images + image) * block.in_rows + in_row[a] - block.in_row) * kRowBytes;
    if (exists && in_row[a] < args.h) {
      first_tap = min(first_tap, in_row[a] < 0 ? (-in_row[a] + args.dilation_h - 1) / args.dilation_h : 0);
      end_tap = max(end_tap, min(args.kernel_h, (args.h - 1 - in_row[a]) / args.dilation_h + 1));
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    first_tap = min(first_tap, __shfl_xor_sync(~0u, first_tap, offset));
    end_tap = max(end_tap, __shfl_xor_sync(~0u, end_tap, offset));
  }

  const float bias =
      args.bias && channel < block.channels ? load(static_cast<const T*>(args.bias) + block.channel + channel) : 0.f;
  float sum[kTilesH][kTilesW][4];
#pragma unroll
  for (int a = 0; a < kTilesH; ++a)
#pragma unroll
    for (int n = 0; n < kTilesW; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[a][n][e] = bias;

  const unsigned* lane_pairs = pairs + channel * args.kernel_h * Traits::kBand + (kChunk - 1) * kStrideW +
                               2 * (lane % 4) - kStrideW * (lane / 4);
  // Small blocks leave warps with fewer tiles than their registers hold: a loop of its own, as branches keep the products
  // of different tiles apart.
  const int tiles = divide_up(block_tiles - first_tile, kTileStep);
  const auto multiply = [&](auto all) {
#pragma unroll 1
    for (int i = first_tap; i < end_tap; ++i) {
      unsigned band[kChunks];
#pragma unroll
      for (int s = 0; s < kChunks; ++s) band[s] = lane_pairs[i * Traits::kBand + s * kChunk];
      const int down = i * args.dilation_h;
#pragma unroll
      for (int a = 0; a < kTilesH; ++a) {
        if (!all.value && a >= tiles) continue;
        const bool in_bounds = static_cast<unsigned>(in_row[a] + down) < static_cast<unsigned>(args.h);
        const unsigned from = in_bounds ? address[a] + down * kRowBytes : zeros;
        unsigned in[Traits::kEndPair][4];  // rows 0-7 and 8-15 of a pair's first chunk, then of its second
#pragma unroll
        for (int k = Traits::kFirstPair; k < Traits::kEndPair; ++k)
          ptx::load_matrices(in[k], from + (k - Traits::kFirstPair) * 32);
#pragma unroll
        for (int step = 0; step < Traits::kSteps; ++step)
#pragma unroll
          for (int n = 0; n < kTilesW; ++n) {
            const int k = Traits::pair(n, step), s = 2 * k - n * kStrideW;
            const bool left = Traits::used(n, 2 * k), right = Traits::used(n, 2 * k + 1);
            if (left && right)
              multiply_k16<T>(sum[a][n], in[k][0], in[k][1], in[k][2], in[k][3], band[s], band[s + 1]);
            else if (left)
              multiply_k8<T>(sum[a][n], in[k][0], in[k][1], band[s]);
            else if (right)
              multiply_k8<T>(sum[a][n], in[k][2], in[k][3], band[s + 1]);
          }
      }
    }
  };
  if (tiles >= kTilesH)
    multiply(std::true_type{});
  else
    multiply(std::false_type{});

  // Stage the outputs where the input was.
  float probe = 0;
#pragma unroll
  for (int a = 0; a < kTilesH; ++a)
#pragma unroll
    for (int n = 0; n < kTilesW; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) probe += sum[a][n][e];
  const bool poisoned = __syncthreads_or(probe != probe);
  const auto for_each_row = [&](auto&& body) {  // body(row among those of the block, pair of the n-th tile)
#pragma unroll
    for (int a = 0; a < kTilesH; ++a)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int flat = (first_tile + a * kTileStep) * kTileRows + half * 8 + lane / 4;
        if (flat < block.images * block.rows)
          body(flat, [&](int n) { return pack<T>(sum[a][n][2 * half], sum[a][n][2 * half + 1]); });
      }
  };
  const auto stage_rows = [&] {
    for_each_row([&](int flat, auto&& pair) {
      T* to = tile + (channel * block.images * block.rows + flat) * Traits::kStagePitch * kChunk + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kTilesW; ++n) *reinterpret_cast<unsigned*>(to + n * kChunk) = pair(n);
    });
    __syncthreads();
  };

  if constexpr (Traits::kChannelsLast) {
    stage_rows();
    store_nhwc<Traits>(tile, args, block, tiling.out_vector == kChannelsNhwc, poisoned);
  } else {
    const ToeplitzOutputs<Traits> stage(args, tiling, block);
    if (tiling.out_vector == kChunk) {
      stage_rows();
      store_aligned<Traits>(tile, stage, args, block, poisoned);
    } else {
      const bool by_twos = tiling.out_vector > 1;
      for_each_row([&](int flat, auto&& pair) {
        const int image = flat / block.rows, first = 2 * (lane % 4);
        T* to = tile + stage.offset(image, flat - image * block.rows) + first;
#pragma unroll
        for (int n = 0; n < kTilesW; ++n, to += kChunk) {
          const unsigned two = pair(n);
          const int columns = block.columns - n * kChunk - first;
          if (by_twos && columns > 0) *reinterpret_cast<unsigned*>(to) = two;
          if (!by_twos && columns > 0) to[0].bits = static_cast<unsigned short>(two);
          if (!by_twos && columns > 1) to[1].bits = static_cast<unsigned short>(two >> 16);
        }
      });
      __syncthreads();
      store_runs<Traits>(tile, stage, args, block, poisoned);
    }
  }
}

template <class Traits>
int launch_toeplitz(const DirectArgs& args, int, cudaStream_t stream) {
  constexpr int kFlatRows = (Traits::kChannelsLast ? 1 : Traits::kWarps) * Traits::kTilesH * kTileRows;
  const DeviceLimits& device = device_limits();
  ToeplitzTiling tiling{};
  tiling.round = device.multiprocessors;
  tiling.tiles_w = divide_up(args.out_w, Traits::kColumns);
  tiling.in_vector = copy_width(args.input, Traits::kChannelsLast ? args.out_c : args.w);
  tiling.out_vector = copy_width(args.out, Traits::kChannelsLast ? args.out_c : args.out_w);
  const int stage_pitch =
      Traits::kChannelsLast || tiling.out_vector == kChunk ? Traits::kStagePitch : Traits::kTilesW + 1;
  const auto shared_bytes = [&] {
    const int in_rows = min_int(args.h, (tiling.rows - 1) * args.stride_h + (args.kernel_h - 1) * args.dilation_h + 1);
    const int planes = Traits::kChannels * tiling.images;
    const int pair_bytes = divide_up(Traits::kChannels * args.kernel_h * Traits::kBand, 4) * 16;
    return pair_bytes + 16 * max_int((planes * in_rows + 1) * Traits::kPitch, planes * tiling.rows * stage_pitch);
  };

  // Several whole images, or as many rows of one as the warps hold and shared memory takes.
  const int64_t channels = divide_up<int64_t>(args.out_c, Traits::kChannels);
  const int images = static_cast<int>(args.n), roomy = device.shared_bytes_for(2);
  const auto blocks = [&] {
    return channels * divide_up(images, tiling.images) * tiling.tiles_w * divide_up(args.out_h, tiling.rows);
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
      const int warps = Traits::kChannelsLast ? Traits::kWarps : 1;  // that take all of the block's tiles
      const int tiles = warps * divide_up(tiling.images * tiling.rows, kTileRows);
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

}  // namespace depthwise
