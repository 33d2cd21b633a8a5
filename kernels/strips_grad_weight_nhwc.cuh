// Grad of weight and bias on the tensor cores, channels_last, for kernels up to nine rows and columns; the idea:
// strips_grad_weight.cuh.
//
// Serves  fp16 and bf16, stride 1, dilation 1, kernels up to kMaxSmallGradWeight rows and columns, any padding and image
//         size; aligned tensors of a multiple of eight channels, multiplier 1.
// Owns    a block takes kChannels channels, 32 bytes of a pixel, which is a sector, and a share of the rounds of patches
//         (see StripsTiling); each of its warps one channel, and the windows of a round's patches as its sixteen strips:
//         two lines of seven or eight windows, or up to four of four. The splits are added by add_splits_kernel: no atomics.
// Memory  two to four stages of kStageRows steps as they lie in global memory, copied asynchronously, and one put planar
//         from there. Raw: blocks of eight pixels, of which the eights of channels change places every four pixels, so
//         that ldmatrix meets no bank twice; it transposes, and words of two pixels are stored into the channels' planes.
//         Planar: a line is a row of a patch, of input and then of grad_output, in a pitch that lets eight neighbouring
//         windows, across lines too, lie in different banks; planes lie an odd number of 16-byte words apart.
// Chosen  select_grad_weight.h.
#pragma once

#include "strips_grad_weight.cuh"

namespace depthwise {

// Compiled for the kernel's rows; its columns are known at launch.
template <class T_, int kKernelH_>
struct StripsGradWeightNhwcTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_;
  static constexpr int kChannels = kStripsGradWeightChannels, kEights = kChannels / 8;
  static constexpr int kThreads = 32 * kChannels;
  static constexpr int kBlocks = strips_blocks_nhwc(kKernelH);  // of a multiprocessor
  static constexpr int kStageRows = strips_stage_rows(kKernelH, kStripsFewestRowsNhwc);
#if __CUDA_ARCH__ >= 800
  static constexpr int kPutAtOnce = kBlocks > 1 ? 1 : 2;  // pairs of blocks, as registers allow
  static constexpr bool kKeepsSource = true;              // where a thread's first word of the next stage lies
#else
  static constexpr int kPutAtOnce = 1;
  static constexpr bool kKeepsSource = kKernelH < 9;
#endif
  static constexpr int kBlockBytes = 8 * kChannels * 2;            // eight pixels
  static constexpr int kRowsAtOnce = kKernelH < 5 ? kKernelH : 5;  // of the kernel, whose diagonals are added
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    strips_grad_weight_nhwc_kernel(const GradWeightArgs args, const StripsTiling tiling,
                                   const StripsLayoutNhwc layout) {
  using T = typename Traits::T;
  constexpr int kKernelH = Traits::kKernelH, kStageRows = Traits::kStageRows, kThreads = Traits::kThreads;
  constexpr int kEights = Traits::kEights;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const planes = reinterpret_cast<T*>(shared_memory);
  unsigned char* const raw = shared_memory + Traits::kChannels * layout.plane * 2;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channels = static_cast<int>(args.out_c), first_channel = blockIdx.x * Traits::kChannels;
  const int begin = min(static_cast<int>(blockIdx.y) * tiling.block_rounds, tiling.rounds);
  const int end = min(begin + tiling.block_rounds, tiling.rounds);
  const int blocks = tiling.blocks(), line_words = blocks * 8 * kEights;

  // Loading: this thread's word of eight channels of a row of a round, and few threads another one.
  struct Source {
    const T* pixel;           // of the round's next stage; of a row that may not exist
    int row_step, low, high;  // elements; the steps that exist
  };
  int load_round = begin, load_stage = 0;
  const int row_words = tiling.lines * line_words;
  const auto source_of = [&](int word) {
    const int line = word / line_words, rest = word % line_words, idx = load_round * tiling.lines + line;
    const int channel = first_channel + rest % kEights * 8;
    const Patch patch = patch_at(tiling, min(idx, tiling.patches - 1));
    const bool of_input = rest / (8 * kEights) <= tiling.windows;
    int column = rest / kEights + tiling.first_column + patch.first_column;
    if (!of_input) column += tiling.shift - kWindow * (tiling.windows + 1);
    const int row = patch.first_row - (of_input ? args.padding_h : 0);
    const int height = of_input ? args.h : args.out_h, width = of_input ? args.w : args.out_w;
    const bool exists = word < row_words && idx < tiling.patches && channel < channels &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(width);
    const int64_t first_row = patch.image * height + row + load_stage * kStageRows - tiling.head;
    return Source{static_cast<const T*>(of_input ? args.input : args.grad_output) +
                      (first_row * width + column) * channels + channel,
                  width * channels, -row, exists ? min(of_input ? tiling.steps : tiling.rows, height - row) : -row};
  };
  const CachePolicy policy(args);
  const auto copy_word = [&](Source& source, unsigned char* shared, int word) {
    const int first_step = load_stage * kStageRows - tiling.head;
    const unsigned mask = bits_between<kStageRows>(source.low - first_step, source.high - first_step);
    unsigned char* target = shared + (word ^ (word / (4 * kEights) & 1)) * 16;
#pragma unroll
    for (int r = 0; r < kStageRows; ++r) {
      policy.copy_async<16>(target, source.pixel, mask >> r & 1);
      source.pixel += source.row_step;
      target += layout.raw_row;
    }
  };
  Source own;
  const auto load = [&](unsigned char* shared) {
    if (load_round < end) {
      if (Traits::kKeepsSource) {
        if (load_stage == 0) own = source_of(threadIdx.x);
        if (static_cast<int>(threadIdx.x) < row_words) copy_word(own, shared, threadIdx.x);
      }
      for (int word = threadIdx.x + (Traits::kKeepsSource ? kThreads : 0); word < row_words; word += kThreads) {
        Source other = source_of(word);
        copy_word(other, shared, word);
      }
      if (++load_stage == tiling.stages) load_stage = 0, ++load_round;
    }
    commit_copies();
  };

  // Putting planar: a warp takes two blocks of eight pixels at a time. Matrix k: eight k % 2 of block k / 2.
  const int matrix = lane / 8, pixel = lane % 8;
  const unsigned matrix_offset = (matrix / 2 * 8 + pixel) * 32 + (matrix % 2 ^ pixel / 4) * 16;
  const int num_blocks = kStageRows * tiling.lines * blocks;
  const auto put_planar = [&](const unsigned char* shared, int first_line) {
    const unsigned from = ptx::shared_address(shared) + matrix_offset;
    T* const to = planes + lane / 4 * layout.plane + lane % 4 * 2;
    const auto put_two = [&](int first, T* to_first, T* to_second) {
      unsigned pairs[4];
      const bool single = first + 1 == num_blocks;
      ptx::load_matrices_transposed(pairs, from + (first - (single ? matrix / 2 : 0)) * Traits::kBlockBytes);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        *reinterpret_cast<unsigned*>(to_first + k * 8 * layout.plane) = pairs[k];
        if (!single) *reinterpret_cast<unsigned*>(to_second + k * 8 * layout.plane) = pairs[2 + k];
      }
    };
    const int begin = first_line * blocks + 2 * warp;
    if (layout.pitch == blocks * 8) {  // blocks lie side by side
#pragma unroll Traits::kPutAtOnce
      for (int first = begin; first < num_blocks; first += 2 * Traits::kChannels)
        put_two(first, to + first * 8, to + first * 8 + 8);
      return;
    }
#pragma unroll Traits::kPutAtOnce
    for (int first = begin; first < num_blocks; first += 2 * Traits::kChannels) {
      const int line = first * layout.line_factor >> 16, block = first - line * blocks;
      T* const to_first = to + line * layout.pitch + block * 8;
      put_two(first, to_first, block + 1 == blocks ? to + (line + 1) * layout.pitch : to_first + 8);
    }
  };

  // Multiplying: where this lane's rows of the matrices begin, and how far it is to the next step's.
  float sum[kKernelH][4] = {}, bias[4] = {};
  unsigned grads[kKernelH][2];
  const bool has_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;
  // Strips that do not exist stand for the last one, which meets no bank twice, and of grad_output they are made zeros.
  const int strips = tiling.lines * tiling.windows;
  const auto address_of = [&](int strip, int column) {
    const int line = min(strip, strips - 1) / tiling.windows, window = min(strip, strips - 1) % tiling.windows;
    return ptx::shared_address(planes + warp * layout.plane + line * layout.pitch + window * kWindow + column);
  };
  const unsigned input_address = address_of(input_strip_of(lane), input_column_of(lane));
  const unsigned grad_address = address_of(lane % kStripsAtOnce, kWindow * (tiling.windows + 1));
  const unsigned row_bytes = 2 * layout.row;
  const auto pair_mask = [&](int first) {
    return (first < strips ? 0xffffu : 0) | (first + 1 < strips ? ~0xffffu : 0);
  };
  const unsigned masks[2] = {pair_mask(lane % 4 * 2), pair_mask(lane % 4 * 2 + 8)};

  const auto multiply_stage = [&] {
    for_each_index<kStageRows>([&](auto row) {
      constexpr int kRow = decltype(row)::value, kNewest = kRow % kKernelH;
      unsigned x[4];
      ptx::load_matrices_transposed(x, input_address + kRow * row_bytes);
      ptx::load_matrices_transposed(grads[kNewest], grad_address + kRow * row_bytes);
      grads[kNewest][0] &= masks[0], grads[kNewest][1] &= masks[1];
      if (has_bias) multiply_ones<T>(bias, grads[kNewest]);
      multiply_strips<T, kNewest>(sum, x, grads);
    });
  };

  const int ahead = tiling.buffers - 1, total = (end - begin) * tiling.stages;
  int buffer = 0, stage = 0;
  for (int k = 0; k < ahead; ++k) load(raw + k * layout.raw_stage);
#pragma unroll 1
  for (int idx = 0; idx < total; ++idx) {
    wait_for_stage(ahead);
    __syncthreads();
    load(raw + (buffer == 0 ? ahead : buffer - 1) * layout.raw_stage);  // which all have put planar
    put_planar(raw + buffer * layout.raw_stage, stage == 0 ? tiling.head * tiling.lines : 0);
    __syncthreads();
    if (stage == 0) {
#pragma unroll
      for (int i = 0; i < kKernelH; ++i) grads[i][0] = grads[i][1] = 0;
    }
    if (stage * kStageRows < tiling.head)
      take_grads<T, kStageRows>(grads, bias, has_bias, grad_address, row_bytes, masks, tiling.head);
    else
      multiply_stage();
    if (++stage == tiling.stages) stage = 0;
    if (++buffer == tiling.buffers) buffer = 0;
  }
  wait_for_copies<0>();
  let_second_pass_begin();

  // Diagonals, some rows of the kernel at a time, in a fixed order: eight lanes take a tap's sums of column n.
  const int64_t channel = first_channel + warp;
  const int taps = kKernelH * args.kernel_w, n = lane % kWindow;
  const auto store = [&](int tap, float value) {
    store_grad_weight<T>(args, blockIdx.y, channel * taps + tap, args.out_c * taps, value);
  };
  float* const sums = reinterpret_cast<float*>(shared_memory) + warp * Traits::kRowsAtOnce * kSumsOfProduct;
  bool finite = true;
#pragma unroll
  for (int first_i = 0; first_i < kKernelH; first_i += Traits::kRowsAtOnce) {
    const int rows = min(Traits::kRowsAtOnce, kKernelH - first_i);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Traits::kRowsAtOnce; ++i)
      if (i < rows) store_product(sums + i * kSumsOfProduct, sum[first_i + i < kKernelH ? first_i + i : 0]);
    __syncthreads();
    for (int first = 0; first < rows * args.kernel_w; first += 4) {
      const int tap = first + lane / kWindow, i = min(tap / args.kernel_w, rows - 1), j = tap % args.kernel_w;
      const int m = n + j + tiling.shift - args.padding_w;
      const float value = sum_of_columns(sums[i * kSumsOfProduct + m * kWindow + n]);
      finite = finite && is_finite(value);
      if (n == 0 && tap < rows * args.kernel_w && channel < channels) store(first_i * args.kernel_w + tap, value);
    }
  }
  const float channel_bias = sum_of_ones(bias);
  if (lane == 0 && channel < channels) store_grad_bias<T>(args, blockIdx.y, channel, channel_bias);

  int anywhere = !finite;  // of the warp
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) anywhere |= __shfl_xor_sync(~0u, anywhere, offset);
  if (!anywhere || channel >= channels) return;
  __syncwarp();  // other lanes have stored these taps
  for (int tap = lane; tap < taps; tap += 32) store(tap, exact_strips<T>(args, tiling, true, channel, tap, begin, end));
}

template <class Traits>
StripsLayoutNhwc layout_of(const StripsTiling& tiling) {
  return StripsLayoutNhwc(Traits::kKernelH, tiling.lines, tiling.windows, tiling.buffers);
}

template <class Traits>
std::pair<StripsTiling, StripsLayoutNhwc> strips_tiling_nhwc(const GradWeightArgs& args) {
  StripsTiling tiling{};
  tiling.shift = args.padding_w, tiling.first_column = -args.padding_w;
  const int shared = device_limits().shared_bytes_for(Traits::kBlocks);
  const StripsCutNhwc cut = strips_cut_nhwc(args.kernel_h, args.out_w, shared);
  tiling.windows = cut.windows, tiling.segments = cut.segments;
  int64_t least = INT64_MAX;
  cut_into_pieces(args, cut.lines, Traits::kStageRows, 1, least, tiling);
  // No more lines than give every block as many patches.
  const int lines = divide_up(divide_up(tiling.patches, args.splits), tiling.block_rounds);
  if (lines < tiling.lines) {
    tiling.lines = lines;
    tiling.rounds = divide_up(tiling.patches, lines);
    tiling.block_rounds = divide_up(tiling.rounds, args.splits);
  }
  for (tiling.buffers = 4; tiling.buffers > 2; --tiling.buffers)
    if (layout_of<Traits>(tiling).bytes <= shared) break;
  return {tiling, layout_of<Traits>(tiling)};
}

template <class Traits>
int launch_strips_grad_weight_nhwc(const GradWeightArgs& args, int, cudaStream_t stream) {
  const auto kernel = strips_grad_weight_nhwc_kernel<Traits>;
  const auto [tiling, layout] = strips_tiling_nhwc<Traits>(args);
  const int bytes =
      max_int(layout.bytes, Traits::kChannels * Traits::kRowsAtOnce * kSumsOfProduct * static_cast<int>(sizeof(float)));
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  const auto channels = static_cast<unsigned>(divide_up<int64_t>(args.out_c, Traits::kChannels));
  kernel<<<dim3(channels, args.splits), Traits::kThreads, bytes, stream>>>(args, tiling, layout);
  return cudaGetLastError();
}

}  // namespace depthwise
