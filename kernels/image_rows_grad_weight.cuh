// Grad of weight and bias of small images on the tensor cores, channels_last, for kernels of few rows.
//
// Serves  fp16 and bf16, stride 1, dilation 1, images and outputs of at most kColumns rows and columns, kernels of up to
//         kMaxImageRowsKernel rows that reach less than kColumns columns to either side, any batch; aligned tensors of a
//         multiple of eight channels, multiplier 1.
// Idea    The K of a product are the rows h of one image of one channel: for kernel row i,
//         D[m][n] = sum over h of x[h + i - padding][m] * g[h][n], and on its diagonals lie the terms of kernel column
//         m - n + padding. So a kernel row has two accumulators of 16x8, for all images. Of the multiplies of a product,
//         h / 16 * (w / 16)^2 are of pixels; kernels narrower than the image leave diagonals unused.
// Zeros   stand for rows that do not exist, and times infinity poison a sum: sums that are not finite are computed anew,
//         term by term. Accumulators of columns that do not exist are left out.
// Owns    A block takes kChannels channels, 32 bytes of a pixel, which is a sector, and a share of the images; each of its
//         warps one channel. A thread brings two neighbouring pixels of eight channels of every image, of which those of
//         the next kAhead images are under way in registers, and stores them planar, as one word for each channel. The
//         splits are added by add_splits_kernel: no atomics.
// Memory  planes of two images, 28 KB each: rows three 16-byte words apart, so that ldmatrix meets no bank twice, those of
//         input between rows of zeros. The diagonals take their place, 37 KB.
// Chosen  select_grad_weight.h.
#pragma once

#include "cache_policy.cuh"
#include "exact_grad_weight.cuh"
#include "images_grad_weight_sums.cuh"
#include "images_tiling.h"

namespace depthwise {

template <class T_, int kKernelH>
struct ImageRowsGradWeightTraits {
  using T = T_;
  static constexpr int kColumns = kImageRowsSize, kVector = 8;
  static constexpr int kChannels = kImageRowsChannels, kEights = kChannels / kVector, kThreads = 32 * kChannels;
  static_assert(2 * kColumns * kColumns / 2 * kEights <= kThreads);  // pairs of pixels of both tensors
#if __CUDA_ARCH__ >= 800
  static constexpr int kAhead = 3;  // images, as registers allow
#else
  static constexpr int kAhead = 1;
#endif

  // Elements, for each channel of a buffer: the rows of input that all kernel rows meet, and those of grad_output.
  static constexpr int kInRows = kColumns + kKernelH - 1, kRowPitch = kColumns + 8;
  static constexpr int kChannelPitch = (kInRows + kColumns) * kRowPitch;
  static constexpr int kBufferElements = kChannels * kChannelPitch;

  // For WideSums and Diagonals.
  static constexpr int kSegmentRows = kKernelH, kTiles = 1, kSpan = 1, kParts = 2 * (2 * kSpan + 1);
  static constexpr int kDiagonalPitch = 37, kDiagonalBuffers = 2;
  static constexpr int kDiagonalFloats = kDiagonalBuffers * 8 * kDiagonalPitch;
  static constexpr int kBytes = max_int(4 * kBufferElements, kChannels * kDiagonalFloats * 4);
  static_assert(kBytes <= kSharedBytesEverywhere);
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) image_rows_grad_weight_kernel(const GradWeightArgs args) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kSegmentRows, kAhead = Traits::kAhead, kRowPitch = Traits::kRowPitch;
  constexpr int kVector = Traits::kVector, kChannelPitch = Traits::kChannelPitch;
  constexpr unsigned kRowBytes = kRowPitch * sizeof(T), kBufferBytes = Traits::kBufferElements * sizeof(T);
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const planes = reinterpret_cast<T*>(shared_memory);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * Traits::kChannels;
  const int channels = static_cast<int>(min(static_cast<int64_t>(Traits::kChannels), args.out_c - first_channel));
  const int64_t begin = args.n * blockIdx.y / args.splits;
  const int images = static_cast<int>(args.n * (blockIdx.y + 1) / args.splits - begin);

  // Loading: this thread's pixels, of either tensor.
  const int eight = thread % Traits::kEights, pair = thread / Traits::kEights;
  const int in_pairs = args.h * divide_up(args.w, 2);
  const bool of_input = pair < in_pairs;
  const int height = of_input ? args.h : args.out_h, width = of_input ? args.w : args.out_w;
  const int row = (of_input ? pair : pair - in_pairs) / divide_up(width, 2);
  const int column = (of_input ? pair : pair - in_pairs) % divide_up(width, 2) * 2;
  const bool loads = row < height && eight * kVector < channels;
  const T* source = static_cast<const T*>(of_input ? args.input : args.grad_output) +
                    ((begin * height + row) * width + column) * args.out_c + first_channel + eight * kVector;
  const int64_t image_step = args.out_c * (height * width);
  const int second =
      column + 1 < width ? static_cast<int>(args.out_c) : 0;  // else it is a column that may hold anything
  T* const target = planes + eight * kVector * kChannelPitch +
                    (row + (of_input ? args.padding_h : Traits::kInRows)) * kRowPitch + column;
  // Words as they came: taken apart, they would be waited for at once.
  struct Pixels {
    uint4 first, second;
  };
  Pixels ahead[kAhead];
  const CachePolicy policy(args);
  const auto load_image = [&](Pixels& pixels, bool exists) {
    pixels = {};
    if (loads && exists) {
      pixels.first = policy.load(reinterpret_cast<const uint4*>(source));
      pixels.second = policy.load(reinterpret_cast<const uint4*>(source + second));
    }
    source += image_step;
  };
  const auto store_image = [&](const Pixels& pixels, T* to) {
    if (!loads) return;
    const auto store = [&](int channel, unsigned first, unsigned second) {
      *reinterpret_cast<unsigned*>(to + channel * kChannelPitch) = __byte_perm(first, second, 0x5410);
      *reinterpret_cast<unsigned*>(to + (channel + 1) * kChannelPitch) = __byte_perm(first, second, 0x7632);
    };
    store(0, pixels.first.x, pixels.second.x);
    store(2, pixels.first.y, pixels.second.y);
    store(4, pixels.first.z, pixels.second.z);
    store(6, pixels.first.w, pixels.second.w);
  };
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) load_image(ahead[slot], slot < images);
#pragma unroll 1
  for (int k = thread; k < static_cast<int>(2 * kBufferBytes / sizeof(uint4)); k += Traits::kThreads)
    reinterpret_cast<uint4*>(shared_memory)[k] = uint4{};
  __syncthreads();

  // ldmatrix: where this lane's rows of the matrices lie, see images_grad_weight_sums.cuh.
  const unsigned plane = ptx::shared_address(planes + warp * kChannelPitch);
  const unsigned in_address = plane + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
  const unsigned grad_address = plane + (Traits::kInRows + lane / 8 % 2 * 8 + lane % 8) * kRowBytes + lane / 16 * 16;

  WideSums<Traits> sums;
  float bias = 0.f;
  const bool has_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;
  const auto multiply_image = [&](unsigned buffer) {
    unsigned grad[4];
    ptx::load_matrices_transposed(grad, grad_address + buffer);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      unsigned x[4];
      ptx::load_matrices_transposed(x, in_address + buffer + i * kRowBytes);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        multiply_k16<T>(sums.sum[i][0][n], x[0], x[1], x[2], x[3], grad[2 * n], grad[2 * n + 1]);
    }
    if (!has_bias) return;
#pragma unroll
    for (int n = 0; n < 2; ++n)
      if (lane / 4 + 8 * n < args.out_w)
        bias += (low_to_float<T>(grad[2 * n]) + high_to_float<T>(grad[2 * n])) +
                (low_to_float<T>(grad[2 * n + 1]) + high_to_float<T>(grad[2 * n + 1]));
  };

  // With two buffers a barrier an image is enough: what it lets be overwritten is the image before the last.
  unsigned buffer = 0;
#pragma unroll 1
  for (int first = 0; first < images; first += kAhead) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int image = first + slot;
      if (image >= images) break;
      store_image(ahead[slot], target + buffer / sizeof(T));
      load_image(ahead[slot], image + kAhead < images);
      __syncthreads();
      multiply_image(buffer);
      buffer = kBufferBytes - buffer;
    }
  }
  let_second_pass_begin();

  __syncthreads();
  const Diagonals<Traits> diagonals{reinterpret_cast<float*>(shared_memory) + warp * Traits::kDiagonalFloats};
  diagonals.clear();
  if (warp >= channels) return;
  const int64_t channel = first_channel + warp, weights = args.out_c * kRows * args.kernel_w;
  const int j = lane - Traits::kColumns + args.padding_w;
  const bool stores = lane > 0 && static_cast<unsigned>(j) < static_cast<unsigned>(args.kernel_w);
  const auto store = [&](int tap, float value) {
    store_grad_weight<T>(args, blockIdx.y, channel * kRows * args.kernel_w + tap, weights, value);
  };
  float parts[kRows][Traits::kParts];
  bool finite = true;
  sums.fold(parts, args.w, args.out_w);
  for_each_index<kRows>([&](auto index) {
    constexpr int i = decltype(index)::value;
    float value[1];
    diagonals.template sum<i, 1>(value, parts + i);
    finite = finite && is_finite(value[0]);
    if (stores) store(i * args.kernel_w + j, value[0]);
  });
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) bias += __shfl_xor_sync(~0u, bias, offset);
  if (lane == 0) store_grad_bias<T>(args, blockIdx.y, channel, bias);

  int anywhere = !finite;  // of the warp
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) anywhere |= __shfl_xor_sync(~0u, anywhere, offset);
  if (!anywhere) return;
  __syncwarp();  // other lanes have stored these taps
  for (int tap = lane; tap < kRows * args.kernel_w; tap += 32)
    store(tap, exact_grad_weight<T>(args, true, channel, tap / args.kernel_w, tap % args.kernel_w,
                                    {begin, begin + images, 0, args.out_h, 0, args.out_w}));
}

template <class Traits>
int launch_image_rows_grad_weight(const GradWeightArgs& args, int, cudaStream_t stream) {
  const auto kernel = image_rows_grad_weight_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, Traits::kBytes)) return error;
  const auto blocks = static_cast<unsigned>(divide_up<int64_t>(args.out_c, Traits::kChannels));
  kernel<<<dim3(blocks, args.splits), Traits::kThreads, Traits::kBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace depthwise
