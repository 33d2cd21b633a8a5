// Grad of weight and bias on the tensor cores, both layouts.
//
// Serves  fp16 and bf16, stride 1, dilation 1, kernels up to 64x64, any padding below the kernel's size, any image
//         size, alignment and depth multiplier.
// Idea    For one row g of grad_output and the rows x of the input that it meets, grad_weight[i][j] += sum over w of
//         x[i][w] * g[w - j + padding]. So D[i][j] = A * B: A[i][w] are input rows as they lie in memory, B[w][j] is the
//         Toeplitz matrix of g. A product takes 16 kernel rows i, eight kernel columns j and two eights of columns w, or
//         one where there is no other; multiplies are wasted on the rounding of i, j and w alone (31x31 on 56 columns:
//         6%). A Toeplitz fragment depends on w - j only. A tile of kernel columns takes every other one of 16: so the
//         offsets of its fragments are all even, and a fragment is a word of g, or all odd: then it is halves of that
//         word and its neighbour. The eights of a product are half of the columns apart, so that few fragments have two
//         places in pairs of registers (neighbours: a quarter of all instructions were moves).
// Rows    The next row's operands are loaded while a row is multiplied, into the registers that its steps leave (31x31 on 56
//         columns: 18 words of g, 9 permutes and 4 or 8 ldmatrix for 32 products). NCHW: a warp takes every sixteenth row of
//         grad_output, so that of two tiles of input rows one is in registers already; products keep the tensor cores
//         busy for 90% of the time that warps spend on them (H100, the same).
// Owns    NCHW: a block takes one channel and a share of the stages (a stage: some images, or a band of rows and a tile
//         of columns of one), its warps rows of grad_output. channels_last: eight channels, one for each warp. Very
//         large kernels have two warps share the kernel's rows, and four channels. Sums stay in fp32 registers to the
//         end; the warps' are added in a fixed order, and the splits by add_splits_kernel: no atomics.
// Memory  NCHW: two stages, copied asynchronously. channels_last: planes of the channels, of a ring of input rows and a
//         step's rows of grad_output, or of a whole image where that fits; the pixels of the next step, copied
//         asynchronously, by 4 to 16 bytes as aligned, while one is multiplied, and put planar by transposing ldmatrix (odd
//         channels: loaded when that is done). As much as lets two blocks share a multiprocessor.
// Zeros   stand for the padding in both matrices, and zero times infinity would poison a sum. But whatever is not finite
//         reaches a sum then: a block whose sums are not all finite takes them again, term by term within bounds.
// Chosen  select_grad_weight.h.
#pragma once

#include "direct.cuh"
#include "exact_grad_weight.cuh"
#include "rectangle.cuh"
#include "tensor_core.cuh"
#include "toeplitz_grad_weight_stages.cuh"
#include "toeplitz_grad_weight_sums.cuh"

namespace depthwise {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kLeastBlocks<Traits>)
    toeplitz_grad_weight_kernel(const GradWeightArgs args, const ToeplitzGradWeightTiling tiling,
                                const int shared_bytes) {
  using T = typename Traits::T;
  constexpr int kTilesJ = Traits::kTilesJ, kGroupTiles = Traits::kGroupTiles;
  constexpr int kPairs = Traits::kPairs, kFragments = Traits::kFragments;
  constexpr int kFragmentOfZero = kTilesJ - 2;  // the one of column 0 and tile 0
  const int taps = args.kernel_h * args.kernel_w;

  const int first_channel = blockIdx.x * Traits::kChannels;
  // The block's stages: the first blocks take one more.
  const auto first_stage = [&] {
    const int split = static_cast<int>(blockIdx.y);
    return split * tiling.split_stages + min(split, tiling.longer_splits);
  };
  const auto last_stage = [&] {
    return first_stage() + tiling.split_stages + (static_cast<int>(blockIdx.y) < tiling.longer_splits ? 1 : 0);
  };

  const bool one_band = tiling.num_bands == 1;
  ToeplitzWalk walk(tiling, first_stage());
  if constexpr (!Traits::kChannelsLast) {
    // A single stage: on its way to the L2 cache while shared memory is cleared (31x31, 64x3x56x56, fp16, H200: 14.4 us,
    // 14.7; where others follow, as fast or slower).
    if (tiling.stages <= args.splits && first_stage() < last_stage()) {
      const ToeplitzStage stage = walk.stage(args, tiling);
      const int first_row = max(0, stage.first_row - args.padding_h);
      const int last_row = min(args.h, stage.first_row + stage.rows + args.kernel_h - 1 - args.padding_h);
      prefetch_rows(static_cast<const T*>(args.input) + stage.first_image * tiling.input_image +
                        first_channel / args.multiplier * (static_cast<int64_t>(args.h) * args.w) +
                        static_cast<int64_t>(first_row) * args.w,
                    tiling.input_image, stage.images, (last_row - first_row) * args.w);
      prefetch_rows(static_cast<const T*>(args.grad_output) + stage.first_image * tiling.grad_image +
                        first_channel * (static_cast<int64_t>(args.out_h) * args.out_w) +
                        static_cast<int64_t>(stage.first_row) * args.out_w,
                    tiling.grad_image, stage.images, stage.rows * args.out_w);
    }
  }

  extern __shared__ __align__(16) unsigned char shared_memory[];
  for (int k = threadIdx.x; k < shared_bytes / 16; k += Traits::kThreads)
    reinterpret_cast<uint4*>(shared_memory)[k] = uint4{};
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp % Traits::kGroups, slot = warp / Traits::kGroups;
  // A plane in shared memory: input rows, then the gradient's. NCHW, a stage: input rows from padding_h above the first row
  // of each image, as far as the last kernel row of the last row meets (what lies between two images is zeros for both).
  // channels_last: a ring of input rows, which every step moves on, and a step's gradient; behind all planes a step's
  // pixels, as they come.
  const int input_elements = tiling.input_rows * Traits::kInputPitch;
  T* const planes = reinterpret_cast<T*>(shared_memory);

  const auto input_of = [&](const ToeplitzStage& stage, int first_row, int rows) {
    return toeplitz_input<Traits>(args, tiling, stage, first_row, rows);
  };
  const auto grad_of = [&](const ToeplitzStage& stage, int first_row, int rows) {
    return toeplitz_grad<Traits>(args, tiling, stage, first_row, rows);
  };

  float sum[kGroupTiles][kTilesJ][4] = {};
  float bias = 0.f;
  const bool has_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;

  // Tiles of kernel columns come in pairs: 16 columns, every other one. Of the even tile, offsets in a gradient row are
  // even, so that a pair of elements is a word; of the odd one it is half of that and half of the word at its side.
  const int parity = args.padding_w & 1;  // of the even tile's kernel columns
  const int side = parity ? 1 : -1;
  const unsigned halves = ptx::opaque(parity ? 0x5432u : 0x1076u);  // the word's upper and the lower of the next, or
                                                                    // the lower and the upper of the one before
  // This lane's word of fragment 0 in a gradient row.
  const int first_word = (args.padding_w - parity - tiling.grad_start) / 2 - 4 * kFragmentOfZero + lane % 4 - lane / 4;
  // This lane's row of the four matrices of an ldmatrix: rows 0 to 7 and 8 to 15 of an eight of columns, then of its
  // partner.
  const int kernel_row = group * Traits::kGroupRows + lane % 16;
  const unsigned partner = lane / 16 * kPairs * 16;  // bytes
  constexpr int kTileBytes = Traits::kTileRows * Traits::kInputPitch * 2, kTileWords = 2 * Traits::kEights;
  constexpr int kSteps = kPairs + Traits::kHasSingle;

  // Input rows, 16 of them, and what step x multiplies of them.
  unsigned window[kGroupTiles][kTileWords], toeplitz[2][kFragments];
  const auto load_tile_step = [&](int tile, unsigned input, int x) {
    if (x < kPairs) {
      unsigned matrices[4];
      ptx::load_matrices(matrices, input + x * 16);
#pragma unroll
      for (int k = 0; k < 4; ++k) window[tile][4 * x + k] = matrices[k];
    } else {
      unsigned matrices[2];
      ptx::load_matrices(matrices, input + 2 * kPairs * 16);
      window[tile][4 * kPairs] = matrices[0], window[tile][4 * kPairs + 1] = matrices[1];
    }
  };
  const auto load_tile = [&](int tile, unsigned input) {
#pragma unroll
    for (int x = 0; x < kSteps; ++x) load_tile_step(tile, input, x);
  };
  const auto load_fragment = [&](int v, const unsigned* grad) {
    toeplitz[0][v] = grad[4 * v];
    toeplitz[1][v] = __byte_perm(toeplitz[0][v], grad[4 * v + side], halves);
  };
  // A row of grad_output. What a step is the last to need makes room for the next row's: load_next(step) does so for tiles.
  const auto multiply_row = [&](int first_tile, const unsigned* next_grad, auto load_next) {
#pragma unroll
    for (int x = 0; x < kSteps; ++x) {
#pragma unroll
      for (int n = 0; n < kGroupTiles; ++n) {
        const unsigned* const a = &window[(first_tile + n) % kGroupTiles][4 * x];
#pragma unroll
        for (int m = 0; m < kTilesJ; ++m) {
          const unsigned* const b = toeplitz[m % 2];
          if (const int v = x - m / 2 * 2 + kFragmentOfZero; x < kPairs)
            multiply_k16<T>(sum[n][m], a[0], a[1], a[2], a[3], b[v], b[v + kPairs]);
          else
            multiply_k8<T>(sum[n][m], a[0], a[1], b[v + kPairs]);
        }
      }
      load_next(x);
#pragma unroll
      for (int v = 0; v < kFragments; ++v)
        if (Traits::last_step(v) == x) load_fragment(v, next_grad);
    }
  };

  // Columns that no other tile adds.
  const auto add_bias = [&](const ToeplitzStage& stage, const T* grad, int first_row, int rows, int step) {
    if (!has_bias || group != 0) return;
    const int high = (stage.last_columns ? args.out_w - stage.first_column : tiling.tile_columns) - tiling.grad_start;
#pragma unroll 1
    for (int row = first_row; row < rows; row += step) {
      float part = 0.f;
#pragma unroll 1
      for (int k = lane - tiling.grad_start; k < high; k += 32) part += to_float(grad[row * Traits::kGradPitch + k]);
      bias += part;
    }
  };

  const int stages = last_stage() - first_stage();
  if constexpr (Traits::kChannelsLast) {
    // Steps fill the ring with what it is short of, as far as the last kernel row of the step's last row meets; a stage's
    // first ones, which are negative, do no more than that. An image that fits is one step, between rows of zeros.
    const int step_rows = tiling.step_rows, first_step = tiling.first_step;
    T* const pixels = planes + Traits::kChannels * tiling.plane_elements;
    T* const grad_pixels = pixels + tiling.step_input_rows * Traits::kTileColumns * kPixelElements;
    const bool copies_input = tiling.input_vector > 1, copies_grad = tiling.grad_vector > 1;  // asynchronously
    const int last = static_cast<int>(args.out_c);
    const auto input_rows_added = [&](int step) { return step < 0 ? tiling.fill_step_rows : tiling.step_input_rows; };
    const auto input_rows_of = [&](const ToeplitzStage& stage, int step) {
      const int before = step < 0 ? step * tiling.fill_step_rows : step * step_rows;  // from step 0 on
      return input_of(stage, stage.first_row + tiling.first_input_row + before, input_rows_added(step));
    };
    const auto grad_rows_of = [&](const ToeplitzStage& stage, int step) {
      return grad_of(stage, stage.first_row + step * step_rows, min(step_rows, stage.rows - step * step_rows));
    };
    const auto threads = [](int lane_bits) { return CopyThreads{Traits::kThreads, ptx::thread_index(), lane_bits}; };
    const auto copy_step = [&](const ToeplitzStage& stage, int step) {
      if (copies_input) {
        Rectangle<T, T> in = input_rows_of(stage, step);
        in.global += first_channel;
        in.shared = pixels;
        in.pitch = Traits::kTileColumns * kPixelElements;
        in.high = Traits::kTileColumns;  // zeros behind the last column
        copy_pixels<Traits::kChannels>(in, tiling.input_vector, threads(tiling.input_lane_bits), last,
                                       last - first_channel);
      }
      if (copies_grad && step >= 0) {
        Rectangle<T, T> out = grad_rows_of(stage, step);
        out.global += first_channel;
        out.shared = grad_pixels;
        out.pitch = tiling.grad_columns * kPixelElements;
        out.high = out.low + tiling.grad_columns;
        copy_pixels<Traits::kChannels>(out, tiling.grad_vector, threads(tiling.grad_lane_bits), last,
                                       last - first_channel);
      }
      commit_copies();
    };
    const auto transpose_step = [&](const ToeplitzStage& stage, int step, int ring_row) {
      const int existing = min(Traits::kChannels, last - first_channel);
      T* const ring = planes + ring_row * Traits::kInputPitch;
      if (copies_input) {
        transpose_pixels<Traits::kChannels>(pixels, Traits::kTileColumns * kPixelElements, ring, Traits::kInputPitch,
                                            tiling.plane_elements, input_rows_added(step), Traits::kEights,
                                            [](int k) { return k / Traits::kEights; });
      } else {
        Rectangle<T, T> in = input_rows_of(stage, step);
        in.shared = ring;
        in.pitch = Traits::kInputPitch;
        transpose_rectangle(in, threads(tiling.input_lane_bits), tiling.in_channels, tiling.plane_elements, existing,
                            [&](int k) { return (first_channel + k) / args.multiplier; });
      }
      if (step < 0) return;
      Rectangle<T, T> out = grad_rows_of(stage, step);
      out.shared = planes + input_elements;
      out.pitch = Traits::kGradPitch;
      if (copies_grad)
        transpose_pixels<Traits::kChannels>(grad_pixels, tiling.grad_columns * kPixelElements, out.shared + out.low,
                                            Traits::kGradPitch, tiling.plane_elements, (step_rows + 3) / 4 * 4,
                                            tiling.grad_columns / 8,
                                            [&](int k) { return tiling.grad_eights.quotient(k); });
      else
        transpose_rectangle(out, threads(tiling.grad_lane_bits), last, tiling.plane_elements, existing,
                            [&](int k) { return first_channel + k; });
    };
    const auto multiply_step = [&](const T* plane, int ring_row, int rows) {
      const unsigned ring = ptx::shared_address(plane) + partner, ring_bytes = input_elements * 2;
      unsigned input[kGroupTiles];
#pragma unroll
      for (int n = 0; n < kGroupTiles; ++n) {
        const int row = ring_row + kernel_row + n * Traits::kTileRows;
        input[n] = ring + (row < tiling.input_rows ? row : row - tiling.input_rows) * (Traits::kInputPitch * 2);
        load_tile(n, input[n]);
      }
      const unsigned* grad = reinterpret_cast<const unsigned*>(plane + input_elements) + first_word;
#pragma unroll
      for (int v = 0; v < kFragments; ++v) load_fragment(v, grad);
#pragma unroll 1
      for (; rows > 0; --rows) {
        if (rows > 1) {  // or loads the last row once more
          grad += Traits::kGradPitch / 2;
#pragma unroll
          for (int n = 0; n < kGroupTiles; ++n) {
            input[n] += Traits::kInputPitch * 2;
            if (input[n] >= ring + ring_bytes) input[n] -= ring_bytes;
          }
        }
        multiply_row(0, grad, [&](int x) {
#pragma unroll
          for (int n = 0; n < kGroupTiles; ++n) load_tile_step(n, input[n], x);
        });
      }
    };

    ToeplitzWalk next = walk;
    int step = first_step, next_step = step, stages_left = stages, ring_row = 0;
    const T* const plane = planes + slot * tiling.plane_elements;
    if (stages_left > 0) copy_step(next.stage(args, tiling), next_step);
#pragma unroll 1
    while (stages_left > 0) {
      const ToeplitzStage stage = walk.stage(args, tiling);
      wait_for_copies<0>();
      __syncthreads();
      if (step == first_step) ring_row = 0;
      transpose_step(stage, step, ring_row + tiling.zero_rows);
      __syncthreads();
      if (first_step < 0) ring_row += input_rows_added(step);
      if (ring_row == tiling.input_rows) ring_row = 0;
      if (++next_step * step_rows >= stage.rows) {
        next.advance(tiling);
        next_step = first_step;
        --stages_left;
      }
      if (stages_left > 0) copy_step(next.stage(args, tiling), next_step);
      if (step >= 0) {
        const int rows = min(step_rows, stage.rows - step * step_rows);
        multiply_step(plane, ring_row, rows);
        add_bias(stage, plane + input_elements, 0, rows, 1);
      }
      walk = next;
      step = next_step;
    }
    __syncthreads();
  } else {
    // Half of the warps copy the input, the others the gradient.
    constexpr int kHalfThreads = Traits::kThreads / 2;
    const bool takes_input = threadIdx.x < kHalfThreads;
    const auto copy_stage = [&](const ToeplitzStage& stage, T* shared) {
      Rectangle<T, T> own;
      if (takes_input) {
        own = one_band ? input_of(stage, 0, args.h)
                       : input_of(stage, stage.first_row - args.padding_h, stage.rows + args.kernel_h - 1);
        own.global += first_channel / args.multiplier * (static_cast<int64_t>(args.h) * args.w);
        own.shared = shared + (one_band ? args.padding_h * Traits::kInputPitch : 0);
        own.pitch = Traits::kInputPitch;
        own.image_pitch = tiling.image_rows * Traits::kInputPitch;
      } else {
        own = grad_of(stage, stage.first_row, stage.rows);
        own.global += first_channel * (static_cast<int64_t>(args.out_h) * args.out_w);
        own.shared = shared + input_elements;
        own.pitch = Traits::kGradPitch;
        own.image_pitch = stage.rows * Traits::kGradPitch;
      }
      const CopyThreads threads{kHalfThreads, ptx::thread_index() % kHalfThreads,
                                takes_input ? tiling.input_lane_bits : tiling.grad_lane_bits};
      const int vector = takes_input ? tiling.input_vector : tiling.grad_vector;
      constexpr int kBatch = 3;  // loads in flight, as registers allow
      if (vector == 1)
        copy_unaligned_rectangle<kBatch>(own, threads,
                                         takes_input ? UnalignedTensor{args.input, tiling.input_end}
                                                     : UnalignedTensor{args.grad_output, tiling.grad_end});
      else
        copy_rectangle(own, vector, threads);
      commit_copies();
    };
    const auto multiply_stage = [&](const ToeplitzStage& stage, const T* shared) {
      // Of each image the warp takes some of the rows 0 to kToeplitzRowStep - 1, and for each of them all that are a multiple
      // of kToeplitzRowStep below. Other ones of every image, as some have a row more.
      constexpr int kStep = Traits::kChannelsLast ? 1 : Traits::kSlots;
      const int first_rows = min(stage.rows, kToeplitzRowStep);
      int image = 0, h = Traits::kChannelsLast ? 0 : slot;
      const unsigned* grad;
      unsigned input;
      int rows;  // from `grad` on
      const auto begin_rows = [&] {
        while (h >= first_rows) {
          if (++image >= stage.images) return false;
          h = Traits::kChannelsLast ? 0 : static_cast<unsigned>(slot + image * stage.rows) % kStep;
        }
        const T* const grad_row = shared + input_elements + (image * stage.rows + h) * Traits::kGradPitch;
        const T* const input_row = shared + (image * tiling.image_rows + h + kernel_row) * Traits::kInputPitch;
        grad = reinterpret_cast<const unsigned*>(grad_row) + first_word;
        input = ptx::shared_address(input_row) + partner;
        rows = (stage.rows - h + kToeplitzRowStep - 1) / kToeplitzRowStep;
        h += kStep;
        return true;
      };
      if (begin_rows()) {
#pragma unroll
        for (int n = 0; n < kGroupTiles; ++n) load_tile(n, input + n * kTileBytes);
#pragma unroll
        for (int v = 0; v < kFragments; ++v) load_fragment(v, grad);
        bool exists = true;
#pragma unroll 1
        do {
#pragma unroll
          for (int u = 0; u < kGroupTiles; ++u) {
            const bool rolls = --rows > 0;
            if (rolls) {
              grad += kToeplitzRowStep * Traits::kGradPitch / 2;
              input += kTileBytes;
            } else {
              exists = begin_rows();  // or loads the last row once more
            }
            multiply_row(u, grad, [&](int x) { load_tile_step(u, input + (kGroupTiles - 1) * kTileBytes, x); });
            if (!exists) break;
            if (!rolls) {
#pragma unroll
              for (int n = 0; n < kGroupTiles - 1; ++n) load_tile((u + 1 + n) % kGroupTiles, input + n * kTileBytes);
            }
          }
        } while (exists);
      }
      add_bias(stage, shared + input_elements, slot, stage.images * stage.rows, Traits::kSlots);
    };

#pragma unroll 1
    for (int idx = -1; idx < stages; ++idx) {  // one behind the stage that is copied
      ToeplitzWalk next = walk;
      if (idx >= 0) {
        wait_for_copies<0>();
        __syncthreads();  // and all have left the stage before
        next.advance(tiling);
      }
      if (idx + 1 < stages) copy_stage(next.stage(args, tiling), planes + (idx + 1) % 2 * tiling.plane_elements);
      if (idx < 0) continue;
      multiply_stage(walk.stage(args, tiling), planes + idx % 2 * tiling.plane_elements);
      walk.advance(tiling);
    }
    __syncthreads();
  }

  let_second_pass_begin();

#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) bias += __shfl_xor_sync(~0u, bias, offset);
  auto* const sums = reinterpret_cast<float*>(shared_memory);
  const bool finite =
      store_sums<Traits>(args, sum, has_bias, bias, parity, sums, first_channel, {warp, lane, group, slot});
  if (!__syncthreads_or(!finite)) return;

  const int channels = min(Traits::kChannels, static_cast<int>(args.out_c) - first_channel);
  for (int k = threadIdx.x; k < channels * taps; k += Traits::kThreads) {
    const int c = first_channel + k / taps;
    const int tap = k % taps, i = tap / args.kernel_w, j = tap % args.kernel_w;
    float total = 0.f;
    ToeplitzWalk walk(tiling, first_stage());
#pragma unroll 1
    for (int idx = first_stage(); idx < last_stage(); ++idx, walk.advance(tiling)) {
      const ToeplitzStage stage = walk.stage(args, tiling);
      const int first_column = stage.first_column + args.padding_w - j;  // of the gradient
      total += exact_grad_weight<T>(args, Traits::kChannelsLast, c, i, j,
                                    {stage.first_image, stage.first_image + stage.images, stage.first_row,
                                     stage.first_row + stage.rows, first_column, first_column + stage.columns});
    }
    store_grad_weight<T>(args, blockIdx.y, static_cast<int64_t>(c) * taps + tap, args.out_c * taps, total);
  }
}

template <class Traits>
int launch_toeplitz_grad_weight(const GradWeightArgs& args, int, cudaStream_t stream) {
  const auto kernel = toeplitz_grad_weight_kernel<Traits>;
  const ToeplitzGradWeightTiling tiling = toeplitz_tiling<Traits>(args);
  const int bytes = toeplitz_shared_bytes<Traits>(tiling);
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  const auto channels = static_cast<unsigned>(divide_up<int64_t>(args.out_c, Traits::kChannels));
  kernel<<<dim3(channels, args.splits), Traits::kThreads, bytes, stream>>>(args, tiling, bytes);
  return cudaGetLastError();
}

}  // namespace depthwise
