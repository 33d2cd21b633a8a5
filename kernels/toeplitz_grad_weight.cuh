// Grad of weight and bias on the tensor cores, both layouts.
//
// Serves  fp16 and bf16, stride 1, dilation 1, kernels up to 64x64, any padding below the kernel's size, any image
//         size, alignment and depth multiplier.
// Idea    For one row g of grad_output and the rows x of the input that it meets, grad_weight[i][j] += sum over w of
//         g[w - j + padding] * x[i][w]. So D[j][i] = A * B: A[j][w] is the Toeplitz matrix of g, B[w][i] are input rows
//         as they lie in memory. A step of 16 columns w takes 16 kernel columns j by 8 kernel rows i; multiplies are
//         wasted on the rounding of w, i and j alone (31x31 on 56 columns: 1 - 56/64 * 31/32 * 31/32 = 18%). A Toeplitz
//         fragment depends on w - j only: 2 * chunks + 2 * tiles - 1 registers hold all of a row's fragments. Pairs at
//         odd offsets are put together from two words.
// Rolls   A variant. A warp takes every eighth row of grad_output: each tile of eight input rows, once in registers, meets
//         one of its rows after the other, as ever lower kernel rows. So a row's products take one new tile from shared
//         memory instead of kGroupTiles: 22 words of gradient and 2 ldmatrix for the 32 products of 31x31 on 64 columns,
//         instead of 22 and 8. All columns of a tile are multiplied, without conditions. Another variant skips the first tile
//         of a warp's first row and the last of its last where they lie outside the image: 8% of 29x29 on 48x48.
// Owns    NCHW: a block takes one channel and a share of the stages (a stage: some images, or a band of rows and a tile
//         of columns of one), its warps rows of grad_output. channels_last: eight channels, one for each warp. Very
//         large kernels have two warps share the kernel's rows, and four channels. Sums stay in fp32 registers to the
//         end; the warps' are added in a fixed order, and the splits by add_splits_kernel: no atomics.
// Memory  NCHW: two stages, copied asynchronously. channels_last: one stage of all channels,
//         put planar on the way. As much as lets two blocks share a multiprocessor.
// Zeros   stand for the padding in both matrices, and zero times infinity would poison a sum. But whatever is not finite
//         reaches a sum then: a block whose sums are not all finite takes them again, term by term within bounds.
// Chosen  select.h.
#pragma once

#include "direct.cuh"
#include "exact_grad_weight.cuh"
#include "rectangle.cuh"
#include "tensor_core.cuh"
#include "toeplitz_grad_weight_tiling.cuh"

namespace depthwise {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    toeplitz_grad_weight_kernel(const GradWeightArgs args, const ToeplitzGradWeightTiling tiling,
                                const int shared_bytes) {
  using T = typename Traits::T;
  constexpr int kTilesJ = Traits::kTilesJ, kGroupTiles = Traits::kGroupTiles, kChunks = Traits::kChunks;
  constexpr int kFragments = 2 * kChunks + 2 * kTilesJ - 1;
  constexpr int kFragmentOfZero = 2 * kTilesJ - 1;  // the one that the first column of chunk 0 and tile 0 starts with
  const int taps = args.kernel_h * args.kernel_w;

  extern __shared__ __align__(16) unsigned char shared_memory[];
  for (int k = threadIdx.x; k < shared_bytes / 16; k += Traits::kThreads)
    reinterpret_cast<uint4*>(shared_memory)[k] = uint4{};
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp % Traits::kGroups, slot = warp / Traits::kGroups;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * Traits::kChannels;
  const int64_t channel = first_channel + (Traits::kChannelsLast ? slot : 0);
  const int begin = static_cast<int>(static_cast<int64_t>(tiling.stages) * blockIdx.y / args.splits);
  const int end = static_cast<int>(static_cast<int64_t>(tiling.stages) * (blockIdx.y + 1) / args.splits);

  // A stage in shared memory: input rows from padding_h above the first row of each image, as far as the last kernel
  // row of the last row meets (what lies between two images is zeros for both), then the gradient's rows.
  const int input_elements = tiling.input_rows * Traits::kInputPitch;
  const int plane_elements = input_elements + tiling.images * tiling.band_rows * Traits::kGradPitch;
  T* const planes = reinterpret_cast<T*>(shared_memory);
  const bool one_column_tile = tiling.num_column_tiles == 1, one_band = tiling.num_bands == 1;

  const auto load_stage = [&](int idx, T* shared) {
    const ToeplitzStage stage = toeplitz_stage(args, tiling, idx);
    const int64_t in_c = args.out_c / args.multiplier;
    const int64_t in_image = in_c * args.h * args.w, grad_image = args.out_c * args.out_h * args.out_w;
    Rectangle<T, T> in, out;
    in.shared = shared + (one_band ? args.padding_h * Traits::kInputPitch : 0);
    in.pitch = Traits::kInputPitch;
    in.image_pitch = tiling.image_rows * Traits::kInputPitch;
    in.global = static_cast<const T*>(args.input) + stage.first_image * in_image;
    in.image_stride = in_image;
    in.row_stride = Traits::kChannelsLast ? args.w * in_c : args.w;
    in.images = stage.images;
    in.rows = one_band ? args.h : stage.rows + args.kernel_h - 1;
    in.first_row = one_band ? 0 : stage.first_row - args.padding_h;
    in.height = args.h;
    in.first_column = stage.first_column;
    in.width = args.w;
    in.low = 0;
    in.high = one_column_tile ? args.w : tiling.tile_columns;
    out.shared = shared + input_elements;
    out.pitch = Traits::kGradPitch;
    out.image_pitch = stage.rows * Traits::kGradPitch;
    out.global = static_cast<const T*>(args.grad_output) + stage.first_image * grad_image;
    out.image_stride = grad_image;
    out.row_stride = Traits::kChannelsLast ? args.out_w * args.out_c : args.out_w;
    out.images = stage.images;
    out.rows = stage.rows;
    out.first_row = stage.first_row;
    out.height = args.out_h;
    out.first_column = stage.first_column + tiling.grad_start;
    out.width = args.out_w;
    out.low = one_column_tile ? -tiling.grad_start : 0;
    out.high = one_column_tile ? args.out_w - tiling.grad_start : Traits::kGradPitch;
    if constexpr (Traits::kChannelsLast) {
      constexpr int kBatch =
          Traits::kSums > 32 || Traits::kSums + Traits::kHeld > 64 ? 1 : 2;  // loads in flight, as registers allow
      const int first = static_cast<int>(first_channel), end = static_cast<int>(args.out_c);
      const auto out_channel = [&](int k) { return first + k < end ? first + k : -1; };
      const auto in_channel = [&](int k) {
        return args.multiplier == 1 || first + k >= end ? out_channel(k) : (first + k) / args.multiplier;
      };
      transpose_rectangle<Traits::kChannels, kBatch>(in, tiling.input_vector == Traits::kChannels, tiling.input_lanes,
                                                     static_cast<int>(in_c), plane_elements, in_channel);
      transpose_rectangle<Traits::kChannels, kBatch>(out, tiling.grad_vector == Traits::kChannels, tiling.grad_lanes,
                                                     static_cast<int>(args.out_c), plane_elements, out_channel);
    } else {
      in.global += first_channel / args.multiplier * args.h * args.w;
      out.global += first_channel * args.out_h * args.out_w;
      if (tiling.input_vector == 1 || tiling.grad_vector == 1) {
        const auto rows = [&] { return UnalignedRectangle<T>(in, {args.input, tiling.input_end}); };
        const auto grad_rows = [&] { return UnalignedRectangle<T>(out, {args.grad_output, tiling.grad_end}); };
        if constexpr (Traits::kBlocks < 3)
          copy_unaligned_rectangles(rows(), grad_rows());
        else  // registers are too few for both
          copy_unaligned_rectangles(rows()), copy_unaligned_rectangles(grad_rows());
      } else {
        copy_rectangle(in, tiling.input_vector, tiling.input_lanes);
        copy_rectangle(out, tiling.grad_vector, tiling.grad_lanes);
      }
      commit_copies();
    }
  };

  float sum[kTilesJ][kGroupTiles][4] = {};
  float bias = 0.f;
  const bool has_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;

  // The pair that starts fragment 0 for this lane: element grad_offset + 2t - g of a gradient row, g and t as in
  // tensor_core.cuh. Its word, and whether it starts in the middle of it.
  const int first_pair = args.padding_w - tiling.grad_start - 8 * kFragmentOfZero + lane % 4 * 2 - lane / 4;
  const int shift = (first_pair & 1) * 16;
  // NCHW: this warp takes every step-th row of every image_step-th image.
  const int step = Traits::kChannelsLast ? 1 : tiling.warps_per_image;
  const int image_step = Traits::kChannelsLast ? 1 : Traits::kSlots / step;
  const int first_image = Traits::kChannelsLast ? 0 : slot / step, first_h = Traits::kChannelsLast ? 0 : slot % step;
  const int kernel_row = group * kGroupTiles * 8 + lane % 8;
  const unsigned matrix = (kChunks == 1 ? lane / 8 % 2 : lane / 8) * 16;  // bytes to this lane's matrix of a chunk

  // All tiles of kernel rows, of which some lie outside the image: without branches, their loads and products overlap
  // (31x31 on 32x128x56x56, fp16, H200: 0.113 ms, skipping them 0.147).
  const auto load_toeplitz = [&](unsigned (&toeplitz)[kFragments], const unsigned* grad) {
#pragma unroll
    for (int v = 0; v < kFragments; ++v) toeplitz[v] = __funnelshift_r(grad[4 * v], grad[4 * v + 1], shift);
  };
  // Chunks `first` and, if it exists, `first` + 1 of eight input rows.
  const auto load_chunks = [&](unsigned (&x)[4], unsigned input, int first) {
    if (first + 1 < kChunks) return ptx::load_matrices(x, input + first * 32);
    unsigned one[2];
    ptx::load_matrices(one, input + first * 32);
    x[0] = one[0], x[1] = one[1];
  };
  const auto multiply = [&](int m, int n, int chunk, const unsigned (&toeplitz)[kFragments], unsigned x0, unsigned x1) {
    const bool half = Traits::kLastTileHalf && m == kTilesJ - 1;  // its upper eight rows are beyond the kernel
    const int v = 2 * (chunk - m) + kFragmentOfZero;
    multiply_k16<T>(sum[m][n], toeplitz[v], half ? 0 : toeplitz[v - 1], toeplitz[v + 1], half ? 0 : toeplitz[v], x0,
                    x1);
  };
  constexpr int kEightRows = 8 * Traits::kInputPitch * 2;  // bytes
  const auto multiply_row = [&](const unsigned* grad, unsigned input, int columns) {
    unsigned toeplitz[kFragments];
    load_toeplitz(toeplitz, grad);
#pragma unroll
    for (int first = 0; first < kChunks; first += 2) {
#pragma unroll
      for (int n = 0; n < kGroupTiles; ++n) {
        unsigned x[4];
        load_chunks(x, input + n * kEightRows, first);
#pragma unroll
        for (int chunk = first; chunk < first + 2 && chunk < kChunks; ++chunk)
          if (chunk == 0 || 16 * chunk < columns) {
#pragma unroll
            for (int m = 0; m < kTilesJ; ++m)
              multiply(m, n, chunk, toeplitz, x[(chunk - first) * 2], x[(chunk - first) * 2 + 1]);
          }
      }
    }
  };

  // Rows of grad_output, each kRollingRows below the one before it. One Toeplitz matrix after the other: its
  // products go to different sums.
  const auto multiply_rolling = [&](const unsigned* grad, unsigned input, int rows, bool skips_first, bool skips_last) {
    unsigned window[kGroupTiles][Traits::kChunkPairs][4], toeplitz[kFragments];
    const auto load_tile = [&](int tile, int n) {
#pragma unroll
      for (int k = 0; k < Traits::kChunkPairs; ++k) load_chunks(window[tile][k], input + n * kEightRows, 2 * k);
    };
    const auto multiply_tiles = [&](int u, int first, int end) {
#pragma unroll
      for (int offset = 1 - kTilesJ; offset < kChunks; ++offset)
#pragma unroll
        for (int n = first; n < end; ++n)
#pragma unroll
          for (int m = 0; m < kTilesJ; ++m) {
            const int chunk = offset + m;
            if (chunk < 0 || chunk >= kChunks) continue;
            const unsigned (&x)[4] = window[(u + n) % kGroupTiles][chunk / 2];
            multiply(m, n, chunk, toeplitz, x[chunk % 2 * 2], x[chunk % 2 * 2 + 1]);
          }
    };
#pragma unroll
    for (int n = 0; n < kGroupTiles - 1; ++n) load_tile(n, n);
#pragma unroll 1
    for (; rows > 0; rows -= kGroupTiles) {
#pragma unroll
      for (int u = 0; u < kGroupTiles; ++u) {
        if (u >= rows) break;
        load_tile((u + kGroupTiles - 1) % kGroupTiles, kGroupTiles - 1);
        load_toeplitz(toeplitz, grad);
        if (Traits::kSkips && u == 0 && skips_first)
          multiply_tiles(u, 1, kGroupTiles);
        else if (Traits::kSkips && u + 1 == rows && skips_last)
          multiply_tiles(u, 0, kGroupTiles - 1);
        else
          multiply_tiles(u, 0, kGroupTiles);
        grad += kRollingRows * Traits::kGradPitch / 2;
        input += kEightRows;
      }
      skips_first = false;
    }
  };

  const auto multiply_stage = [&](int idx, const T* shared) {
    const ToeplitzStage stage = toeplitz_stage(args, tiling, idx);
    const auto grad_at = [&](int image, int h) {
      const T* const row = shared + input_elements + (image * stage.rows + h) * Traits::kGradPitch;
      return reinterpret_cast<const unsigned*>(row) + (first_pair >> 1);
    };
    const auto input_at = [&](int image, int h) {
      const T* const row = shared + (image * tiling.image_rows + h + kernel_row) * Traits::kInputPitch;
      return ptx::shared_address(row) + matrix;
    };
    if constexpr (Traits::kRolls) {
      // All first rows of all images, dealt to the warps; those of every other image to others, so that who has a row more
      // there has none more here.
      constexpr int kWarpsOfRows = Traits::kChannelsLast ? 1 : Traits::kSlots;
#pragma unroll 1
      for (int k = Traits::kChannelsLast ? 0 : slot; k < stage.images * kRollingRows; k += kWarpsOfRows) {
        const int image = k / kRollingRows, h = (k + image * (kRollingRows / 2)) % kRollingRows;
        const int rows = (stage.rows - h + kRollingRows - 1) / kRollingRows;
        // The input rows of the first tile of all, and of the last row's last.
        const int first_row = stage.first_row + h - args.padding_h + group * kGroupTiles * 8;
        const int last_row = first_row + (rows - 1) * kRollingRows + (kGroupTiles - 1) * 8;
        if (h < stage.rows)
          multiply_rolling(grad_at(image, h), input_at(image, h), rows, first_row + 8 <= 0, last_row >= args.h);
      }
    } else {
      for (int image = first_image; image < stage.images; image += image_step) {
        const unsigned* grad = grad_at(image, first_h);
        unsigned input = input_at(image, first_h);
#pragma unroll 1
        for (int h = first_h; h < stage.rows; h += step) {
          multiply_row(grad, input, stage.columns);
          grad += step * (Traits::kGradPitch / 2);
          input += step * (Traits::kInputPitch * 2);
        }
      }
    }
    if (!has_bias || group != 0) return;
    // Columns that no other tile adds.
    const int high = (stage.last_columns ? args.out_w - stage.first_column : tiling.tile_columns) - tiling.grad_start;
    for (int row = Traits::kChannelsLast ? 0 : slot; row < stage.images * stage.rows;
         row += Traits::kChannelsLast ? 1 : Traits::kSlots) {
      const T* const grad = shared + input_elements + row * Traits::kGradPitch;
      float part = 0.f;
      for (int k = lane - tiling.grad_start; k < high; k += 32) part += to_float(grad[k]);
      bias += part;
    }
  };

  if constexpr (Traits::kChannelsLast) {
    for (int idx = begin; idx < end; ++idx) {
      load_stage(idx, planes);
      __syncthreads();
      multiply_stage(idx, planes + slot * plane_elements);
      __syncthreads();
    }
  } else {
#pragma unroll 1
    for (int idx = begin - 1; idx < end; ++idx) {  // one ahead of the stage that is multiplied
      if (idx + 1 < end) {
        load_stage(idx + 1, planes + (idx + 1 - begin) % 2 * plane_elements);
        wait_for_copies<1>();
      } else {
        wait_for_copies<0>();
      }
      if (idx < begin) continue;
      __syncthreads();
      multiply_stage(idx, planes + (idx - begin) % 2 * plane_elements);
      __syncthreads();
    }
  }

  let_second_pass_begin();

  // Add the warps' sums, halving their number step by step.
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) bias += __shfl_xor_sync(~0u, bias, offset);
  if constexpr (!Traits::kChannelsLast) {
    constexpr int kSums = Traits::kSums;
    float* const flat = &sum[0][0][0];
    auto* const others = reinterpret_cast<float*>(shared_memory);
#pragma unroll 1
    for (int half = Traits::kSlots / 2; half > 0; half /= 2) {
      float* const other = others + (slot % half * Traits::kGroups + group) * kSums * 32 + lane;
      if (slot >= half && slot < 2 * half) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) other[k * 32] = flat[k];
      }
      __syncthreads();
      if (slot < half) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) flat[k] += other[k * 32];
      }
      __syncthreads();
    }
    if (group == 0 && lane == 0) others[slot] = bias;
    __syncthreads();
    bias = 0.f;
    for (int k = 0; k < Traits::kSlots; ++k) bias += others[k];
  }

  const auto store = [&](int64_t c, int tap, float value) {
    store_grad_weight<T>(args, blockIdx.y, c * taps + tap, args.out_c * taps, value);
  };
  const bool holds_sums = channel < args.out_c && (Traits::kChannelsLast || slot == 0);
  if (holds_sums && group == 0 && lane == 0) store_grad_bias<T>(args, blockIdx.y, channel, bias);

  bool finite = true;
#pragma unroll
  for (int m = 0; m < kTilesJ; ++m)
#pragma unroll
    for (int n = 0; n < kGroupTiles; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        finite = finite && is_finite(sum[m][n][k]);
        const int i = (group * kGroupTiles + n) * 8 + lane % 4 * 2 + k % 2, j = m * 16 + lane / 4 + k / 2 * 8;
        if (holds_sums && i < args.kernel_h && j < args.kernel_w) store(channel, i * args.kernel_w + j, sum[m][n][k]);
      }
  if (!__syncthreads_or(holds_sums && !finite)) return;

  const int channels = static_cast<int>(min(static_cast<int64_t>(Traits::kChannels), args.out_c - first_channel));
  for (int k = threadIdx.x; k < channels * taps; k += Traits::kThreads) {
    const int64_t c = first_channel + k / taps;
    const int tap = k % taps, i = tap / args.kernel_w, j = tap % args.kernel_w;
    float total = 0.f;
#pragma unroll 1
    for (int idx = begin; idx < end; ++idx) {
      const ToeplitzStage stage = toeplitz_stage(args, tiling, idx);
      const int first_column = stage.first_column + args.padding_w - j;  // of the gradient
      total += exact_grad_weight<T>(args, Traits::kChannelsLast, c, i, j,
                                    {stage.first_image, stage.first_image + stage.images, stage.first_row,
                                     stage.first_row + stage.rows, first_column, first_column + stage.columns});
    }
    store(c, tap, total);
  }
}

template <class Traits>
int launch_toeplitz_grad_weight(const GradWeightArgs& args, int, cudaStream_t stream) {
  const auto kernel = toeplitz_grad_weight_kernel<Traits>;
  const ToeplitzGradWeightTiling tiling = toeplitz_tiling<Traits>(args);
  const int rows_bytes =
      2 * (tiling.input_rows * Traits::kInputPitch + tiling.images * tiling.band_rows * Traits::kGradPitch);
  const int bytes = max_int(Traits::kReductionBytes, Traits::kStages * Traits::kChannels * rows_bytes);
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  const auto channels = static_cast<unsigned>(divide_up<int64_t>(args.out_c, Traits::kChannels));
  kernel<<<dim3(channels, args.splits), Traits::kThreads, bytes, stream>>>(args, tiling, bytes);
  return cudaGetLastError();
}

}  // namespace depthwise
