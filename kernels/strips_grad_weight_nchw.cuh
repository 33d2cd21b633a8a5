// Grad of weight and bias on the tensor cores, NCHW, for kernels up to nine rows and columns; the idea: strips_grad_weight.cuh.
//
// Serves  fp16 and bf16, stride 1, dilation 1, kernels up to kMaxSmallGradWeight rows and columns, any padding, image
//         size, alignment and depth multiplier.
// Owns    a block takes one channel and a share of the rounds of patches (see StripsTiling; patches are whole images where
//         there are enough), each of its warps a window of sixteen patches. The warps' sums are added in a fixed order,
//         and the splits by add_splits_kernel: no atomics.
// Memory  two to four stages of kStageRows steps, copied asynchronously: a line is the row of a patch, of input and then
//         of grad_output, an odd number of 16-byte words, so that ldmatrix meets no bank twice. A window's sixteen columns
//         of input begin at a multiple of eight, for ldmatrix; kernels of fewer than nine columns leave some choice of
//         where the window begins, and four columns further on rows are copied by words of eight bytes.
// Chosen  select_grad_weight.h.
#pragma once

#include "strips_grad_weight.cuh"

namespace depthwise {

// Compiled for the kernel's rows; its columns are known at launch.
template <class T_, int kKernelH_>
struct StripsGradWeightNchwTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_;
  static constexpr int kMaxWarps = 8, kThreads = 32 * kMaxWarps;
  static constexpr int kBlocks = 2;  // of a multiprocessor that registers must leave room for
  static constexpr int kStageRows = strips_stage_rows(kKernelH, 5);
};

// A thread's share of a stage of a line of one tensor: every lanes-th word of kVector elements. `global`: the first column
// of the first row, of `width` elements; bit r of `row_mask`: whether row r exists.
template <int kVector, int kRows, class T>
__device__ __forceinline__ void copy_line(T* shared, int shared_pitch, const T* global, int width, unsigned row_mask,
                                          int first_column, int columns, int lane, int lanes, CachePolicy policy) {
#pragma unroll 1
  for (int k = lane * kVector; k < columns; k += lanes * kVector) {
    const unsigned mask = static_cast<unsigned>(first_column + k) < static_cast<unsigned>(width) ? row_mask : 0;
    if constexpr (kVector == 1) {
      Vector<T, 1> values[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        values[r] = load_or_zero<1>(global + static_cast<int64_t>(r) * width + k, mask >> r & 1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) shared[r * shared_pitch + k] = values[r].value[0];
    } else {
      const T* source = global + k;
      T* target = shared + k;
      const auto copy_rows = [&](auto copy) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          copy(target, source, mask >> r & 1);
          source += width;
          target += shared_pitch;
        }
      };
      constexpr int kBytes = kVector * sizeof(T);
      if (policy.evicts_first)
        copy_rows([&](T* to, const T* from, bool exists) { policy.copy_async<kBytes>(to, from, exists); });
      else
        copy_rows([](T* to, const T* from, bool exists) { copy_async<kBytes>(to, from, exists); });
    }
  }
}

template <int kRows, class T>
__device__ __forceinline__ void copy_line(int vector, T* shared, int shared_pitch, const T* global, int width,
                                          unsigned row_mask, int first_column, int columns, int lane, int lanes,
                                          CachePolicy policy) {
  with_vector(vector, [&](auto constant) {
    copy_line<decltype(constant)::value, kRows>(shared, shared_pitch, global, width, row_mask, first_column, columns,
                                                lane, lanes, policy);
  });
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    strips_grad_weight_nchw_kernel(const GradWeightArgs args, const StripsTiling tiling) {
  using T = typename Traits::T;
  constexpr int kKernelH = Traits::kKernelH, kStageRows = Traits::kStageRows;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const buffers = reinterpret_cast<T*>(shared_memory);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int channel = blockIdx.x;
  const int begin = min(static_cast<int>(blockIdx.y) * tiling.block_rounds, tiling.rounds);
  const int end = min(begin + tiling.block_rounds, tiling.rounds);
  const int row_elements = tiling.lines * tiling.pitch, stage_elements = kStageRows * row_elements;
  const int input_columns = kWindow * (tiling.windows + 1), grad_columns = kWindow * tiling.windows;

  // Loading: this thread's line of a round, and its share of the line.
  const int line = threadIdx.x / tiling.lanes, copy_lane = threadIdx.x % tiling.lanes;
  const int in_c = static_cast<int>(args.out_c) / args.multiplier, in_channel = channel / args.multiplier;
  int load_round = begin, load_stage = 0;
  const T *input = nullptr, *grad = nullptr;  // of the patch's next row; of a row that may not exist
  int input_row = 0, input_column = 0, input_rows = 0, grad_rows = 0;
  const CachePolicy policy(args);
  const auto load = [&](T* shared) {
    if (load_round < end) {
      const int first_step = load_stage * kStageRows - tiling.head;
      if (load_stage == 0) {
        const int idx = load_round * tiling.lines + line;
        const Patch patch = patch_at(tiling, idx);
        input_row = patch.first_row - args.padding_h;
        input_column = tiling.first_column + patch.first_column;
        input_rows = idx < tiling.patches ? min(tiling.steps, args.h - input_row) : 0;
        grad_rows = idx < tiling.patches ? min(tiling.rows, args.out_h - patch.first_row) : 0;
        const int64_t in_plane = patch.image * in_c + in_channel, grad_plane = patch.image * args.out_c + channel;
        input =
            static_cast<const T*>(args.input) + (in_plane * args.h + input_row - tiling.head) * args.w + input_column;
        grad = static_cast<const T*>(args.grad_output) +
               (grad_plane * args.out_h + patch.first_row - tiling.head) * args.out_w + input_column + tiling.shift;
      }
      T* const to = shared + line * tiling.pitch;
      if (first_step >= 0)
        copy_line<kStageRows>(tiling.input_vector, to, row_elements, input, args.w,
                              bits_between<kStageRows>(-input_row - first_step, input_rows - first_step), input_column,
                              input_columns, copy_lane, tiling.lanes, policy);
      copy_line<kStageRows>(tiling.grad_vector, to + input_columns, row_elements, grad, args.out_w,
                            bits_between<kStageRows>(-first_step, grad_rows - first_step), input_column + tiling.shift,
                            grad_columns, copy_lane, tiling.lanes, policy);
      input += static_cast<int64_t>(kStageRows) * args.w;
      grad += static_cast<int64_t>(kStageRows) * args.out_w;
      if (++load_stage == tiling.stages) load_stage = 0, ++load_round;
    }
    commit_copies();
  };

  // Multiplying: where this lane's rows of the matrices of its warp's window of sixteen lines begin.
  float sum[kKernelH][4] = {}, bias[4] = {};
  unsigned grads[kKernelH][2];
  const bool has_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;
  const int first_line = warp / tiling.windows * kStripsAtOnce, window = warp % tiling.windows;
  const auto offset_of = [&](int strip, int column) {
    return 2 * ((first_line + strip) * tiling.pitch + window * kWindow + column);
  };
  const unsigned input_offset = offset_of(input_strip_of(lane), input_column_of(lane));
  const unsigned grad_offset = offset_of(lane % kStripsAtOnce, input_columns);

  // Rows beyond a patch's are zeros; a branch would keep the next row's loads from starting before this row's products.
  const auto multiply_stage = [&](const T* shared) {
    const unsigned base = ptx::shared_address(shared);
    for_each_index<kStageRows>([&](auto row) {
      constexpr int kRow = decltype(row)::value, kNewest = kRow % kKernelH;
      const unsigned at = base + kRow * row_elements * 2;
      unsigned x[4];
      ptx::load_matrices_transposed(x, at + input_offset);
      ptx::load_matrices_transposed(grads[kNewest], at + grad_offset);
      if (has_bias) multiply_ones<T>(bias, grads[kNewest]);
      multiply_strips<T, kNewest>(sum, x, grads);
    });
  };

  const int ahead = tiling.buffers - 1, total = (end - begin) * tiling.stages;
  int load_buffer = ahead, buffer = 0, stage = 0;
  for (int k = 0; k < ahead; ++k) load(buffers + k * stage_elements);
#pragma unroll 1
  for (int idx = 0; idx < total; ++idx) {
    wait_for_stage(ahead);
    __syncthreads();
    load(buffers + load_buffer * stage_elements);  // where all have done with the stage before
    if (stage == 0) {
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) grads[i][0] = grads[i][1] = 0;
    }
    const T* const shared = buffers + buffer * stage_elements;
    if (stage * kStageRows < tiling.head) {
      take_grads<T, kStageRows>(grads, bias, has_bias, ptx::shared_address(shared) + grad_offset, 2 * row_elements,
                                {~0u, ~0u}, tiling.head);
    } else {
      multiply_stage(shared);
    }
    if (++stage == tiling.stages) stage = 0;
    if (++buffer == tiling.buffers) buffer = 0;
    if (++load_buffer == tiling.buffers) load_buffer = 0;
  }
  wait_for_copies<0>();
  __syncthreads();
  let_second_pass_begin();

  // Diagonals, in a fixed order: eight lanes take a tap's sums of column n, warp by warp, then add theirs.
  float* const sums = reinterpret_cast<float*>(shared_memory);
  float* const biases = sums + warps * kKernelH * kSumsOfProduct;
#pragma unroll
  for (int i = 0; i < kKernelH; ++i) store_product(sums + (warp * kKernelH + i) * kSumsOfProduct, sum[i]);
  const float warp_bias = sum_of_ones(bias);
  if (lane == 0) biases[warp] = warp_bias;
  __syncthreads();

  const int taps = kKernelH * args.kernel_w, n = lane % kWindow;
  const auto store = [&](int tap, float value) {
    store_grad_weight<T>(args, blockIdx.y, static_cast<int64_t>(channel) * taps + tap, args.out_c * taps, value);
  };
  bool finite = true;
  for (int first = warp * 4; first < taps; first += warps * 4) {
    const int tap = min(first + lane / kWindow, taps - 1), i = tap / args.kernel_w, j = tap % args.kernel_w;
    const int m = n + j + tiling.shift - args.padding_w;
    float value = 0.f;
    for (int k = 0; k < warps; ++k) value += sums[(k * kKernelH + i) * kSumsOfProduct + m * kWindow + n];
    value = sum_of_columns(value);
    finite = finite && is_finite(value);
    if (n == 0 && first + lane / kWindow < taps) store(tap, value);
  }
  if (threadIdx.x == 0) {
    float value = 0.f;
    for (int k = 0; k < warps; ++k) value += biases[k];
    store_grad_bias<T>(args, blockIdx.y, channel, value);
  }
  if (!__syncthreads_or(!finite)) return;
  for (int tap = threadIdx.x; tap < taps; tap += blockDim.x)
    store(tap, exact_strips<T>(args, tiling, false, channel, tap, begin, end));
}

template <class Traits>
StripsTiling strips_tiling_nchw(const GradWeightArgs& args) {
  StripsTiling tiling{};
  tiling.input_vector = copy_width(args.input, args.w);

  // The shift that allows the widest copies of grad_output; of equals the one with the fewest windows.
  const int row_vector = copy_width(args.grad_output, args.out_w);
  int windows = 0;
  for (int shift = args.padding_w; shift <= args.padding_w + kMaxSmallGradWeight - args.kernel_w; ++shift) {
    int vector = row_vector;
    while (shift % vector != 0) vector /= 2;
    const int first_column = -divide_up(shift, kWindow) * kWindow;
    const int here = divide_up(args.out_w - first_column - shift, kWindow);
    if (vector < tiling.grad_vector || (vector == tiling.grad_vector && here >= windows)) continue;
    tiling.grad_vector = vector, tiling.shift = shift, tiling.first_column = first_column, windows = here;
  }

  // Segments that leave room for two stages.
  const int shared = device_limits().shared_bytes_for(2);
  const auto stage_bytes = [&](int lines) { return Traits::kStageRows * lines * tiling.pitch * 2; };
  for (tiling.segments = divide_up(windows, Traits::kMaxWarps);; ++tiling.segments) {
    tiling.windows = divide_up(windows, tiling.segments);
    tiling.pitch = kWindow * tiling.blocks();
    if (2 * stage_bytes(kStripsAtOnce) <= shared || tiling.windows == 1) break;
  }
  tiling.segments = divide_up(windows, tiling.windows);

  constexpr int kStageCost = 4;  // beside its products, in windows of sixteen patches
  int64_t least = INT64_MAX;
  for (int groups = 1; groups * tiling.windows <= Traits::kMaxWarps; groups *= 2)
    if (groups == 1 || 2 * stage_bytes(groups * kStripsAtOnce) <= shared)
      cut_into_pieces(args, groups * kStripsAtOnce, Traits::kStageRows, kStageCost + groups * tiling.windows, least,
                      tiling);
  tiling.buffers = max_int(2, min_int(4, shared / stage_bytes(tiling.lines)));
  // Few warps: a third block, if it costs no more than the fourth stage.
  if (3 * tiling.warps() <= 2 * Traits::kMaxWarps &&
      3 * stage_bytes(tiling.lines) <= device_limits().shared_bytes_for(3))
    tiling.buffers = min_int(3, tiling.buffers);
  // No more than a block has stages: that may be room for another block (384x14x14, 7x7).
  tiling.buffers = max_int(2, min_int(tiling.block_rounds * tiling.stages, tiling.buffers));
  return tiling;
}

template <class Traits>
int launch_strips_grad_weight_nchw(const GradWeightArgs& args, int, cudaStream_t stream) {
  const auto kernel = strips_grad_weight_nchw_kernel<Traits>;
  StripsTiling tiling = strips_tiling_nchw<Traits>(args);
  const int warps = tiling.warps();
  tiling.lanes = 32 * warps / tiling.lines;
  const int stages_bytes = tiling.buffers * Traits::kStageRows * tiling.lines * tiling.pitch * 2;
  const int bytes = max_int(stages_bytes, warps * (Traits::kKernelH * kSumsOfProduct + 1) * 4);
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  kernel<<<dim3(static_cast<unsigned>(args.out_c), args.splits), 32 * warps, bytes, stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
