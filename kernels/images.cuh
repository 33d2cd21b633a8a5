// Depthwise convolution of images of up to sixteen rows and columns on the tensor cores, eight images a product: forward,
// and grad of input at stride 1 (filter flipped). NCHW and channels_last, fp16 and bf16, fp32 accumulators.
//
// Idea    A product D[16][8] += A[16][16] * B[16][8] has an image a column. Wide images (nine to sixteen columns): B is
//         a row of input, a pixel a row of B, and D a row of outputs; A, the same for all pairs of rows that are as far
//         apart, is the banded matrix of a kernel row, A[m][k] = w[k - m + padding]. Narrow ones: B is two rows of
//         input of eight columns each, D two rows of outputs, A the four banded matrices of 8 x 8 between them.
//         Rows of padding are met by no product: 14x14 outputs of 27x27 take 196 products of 2048 multiplies, of which
//         77% are useful (7x7: 86, 37%); 7x7 outputs of 13x13 take 16, of which 57% are.
// Serves  any number of images and channels, any kernel width, padding and dilation of columns at run time; compile-time
//         are the type, the sizes of both images, and which rows meet: kernels larger than twice the image are alike.
// Owns    a block takes eight images of kChannels channels; a warp one channel. Its planes are registers, two a row
//         (narrow: two every two rows), and its sums four a row (narrow: every two). All loops over rows are unrolled.
// Memory  the planes of the block, and in the same room its outputs. Eight images of 14x14: 12.7 KB for four channels in
//         NCHW, 50 KB for sixteen in channels_last, whose pixels are then whole sectors.
// Band    a lane loads one tap of each kernel row, or of two; the fragments of A are shuffled from lane to lane.
// NaN     A zero of the band times an infinity or NaN gives NaN in outputs that do not see it. So where a block finds a
//         NaN it computes those outputs again with plain multiply-adds over their own taps.
// Chosen  select.h.
#pragma once

#include "images_planes.cuh"
#include "toeplitz.cuh"

namespace depthwise {

// kFirstShift, kShifts, kShiftStep: how far below its output row lies the input row of each kernel row that meets any.
// kChannels: of a block.
template <class T_, int kHeight_, int kWidth_, int kOutHeight_, int kOutWidth_, int kFirstShift_, int kShifts_,
          int kShiftStep_, int kChannels_, bool kChannelsLast_>
struct ImagesTraits {
  using T = T_;
  static constexpr int kHeight = kHeight_, kWidth = kWidth_, kOutHeight = kOutHeight_, kOutWidth = kOutWidth_;
  static constexpr int kPixels = kHeight * kWidth, kOutPixels = kOutHeight * kOutWidth;
  static constexpr int kFirstShift = kFirstShift_, kShifts = kShifts_, kShiftStep = kShiftStep_;
  static constexpr int kStrideW = 1;
  static constexpr int kImages = kImagesTogether, kChannels = kChannels_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kWarps = kChannels, kThreads = 32 * kWarps;
  static constexpr bool kNarrow = is_narrow_image(kWidth, kOutWidth);

  static constexpr int kRoundRows = image_round_rows(kWidth, kOutHeight, kOutWidth, kShifts);
  // What nvcc needs for sm_90; beyond that some more, before sm_80 other products.
  static constexpr int kRegisters = image_registers(kHeight, kWidth, kOutHeight, kOutWidth, kShifts);
#if __CUDA_ARCH__ >= 800
  static constexpr int kSpare = __CUDA_ARCH__ > 900 ? 12 : 0;
  static constexpr int kMinBlocks = max_int(1, min_int(1024, (64 << 10) / (kRegisters + kSpare)) / kThreads);
#else
  static constexpr int kMinBlocks = 1;
#endif

  // Whether a kernel row lies `shift` rows below its output row, and which.
  static constexpr bool exists(int shift) {
    return shift >= kFirstShift && (shift - kFirstShift) % kShiftStep == 0 &&
           (shift - kFirstShift) / kShiftStep < kShifts;
  }
  static constexpr int index(int shift) { return (shift - kFirstShift) / kShiftStep; }

  // Lanes per kernel row while its taps are loaded, and which of them holds what lies in the output's own column.
  static constexpr int kRowLanes = kNarrow ? 16 : 32;
  static constexpr int kOwnLane = kNarrow ? 7 : 15;
};

// A channel's taps and bias. A lane holds one tap of each kernel row: in wide images of two rows a register, in narrow
// ones half the lanes those of the next row. Lane kOwnLane has the tap of the output's own column, the next that of the
// next column.
template <class Traits>
struct Taps {
  static constexpr int kRegisters = divide_up(Traits::kShifts, 2);
  unsigned word[kRegisters];
  typename Traits::T bias;

  // Plain loads, which come before a barrier that comes after them (with the read-only ones of weights.cuh, kernels of both
  // layouts spill); where there is no tap, of any other.
  __device__ __forceinline__ Taps(const DirectArgs& args, int channel) {
    using T = typename Traits::T;
    const int lane = threadIdx.x % 32, size = args.kernel_h * args.kernel_w;
    const int offset = lane % Traits::kRowLanes - Traits::kOwnLane + args.padding_w;
    const int column = args.dilation_w == 1 ? offset : offset / args.dilation_w;
    const bool exists = offset >= 0 && column < args.kernel_w && column * args.dilation_w == offset;
    const int next_row = Traits::kShifts > 1 ? lane / Traits::kRowLanes : 0;
    const int row = (Traits::kFirstShift + args.padding_h) / Traits::kShiftStep + next_row;
    const int first = row * args.kernel_w + (exists ? column : 0);
    const auto* from = filters_of<Traits>(args, channel, size) + (args.flip ? size - 1 - first : first);
    const int step = args.flip ? -args.kernel_w : args.kernel_w;
    bias = args.bias ? round_to<T>(static_cast<const weight_t<Traits>*>(args.bias)[channel]) : T{};
    unsigned short tap[2 * kRegisters];
#pragma unroll
    for (int k = 0; k < Traits::kShifts; k += Traits::kNarrow ? 2 : 1) {
      // The last of an odd number of rows has no next.
      if (Traits::kNarrow && k + 1 == Traits::kShifts && next_row != 0) from -= step;
      tap[k] = round_to<T>(*from).bits;
      from += Traits::kNarrow ? 2 * step : step;
    }
#pragma unroll
    for (int k = 0; k < kRegisters; ++k) {
      const bool both = !Traits::kNarrow && 2 * k + 1 < Traits::kShifts;
      word[k] = exists ? tap[2 * k] | (both ? unsigned{tap[2 * k + 1]} << 16 : 0) : 0;
    }
  }
  // Of the k-th kernel row, the lane's tap and the next lane's; narrow: of rows k and k + 1, k even.
  __device__ __forceinline__ unsigned neighbours(int k) const {
    const unsigned next = __shfl_down_sync(~0u, word[k / 2], 1);
    return k % 2 == 0 ? low_halves(word[k / 2], next) : high_halves(word[k / 2], next);
  }
};

// Two neighbours of a row at `column`, which is even; zeros beyond the image.
template <int kWidth, class T>
__device__ __forceinline__ unsigned load_pixels(const T* row, int column) {
  const auto* const from = &row[column < kWidth ? column : 0].bits;
  if constexpr (kWidth % 2 == 0) {
    const unsigned pair = *reinterpret_cast<const unsigned*>(from);
    return column < kWidth ? pair : 0;
  } else {
    const unsigned first = column < kWidth ? from[0] : 0;
    return column + 1 < kWidth ? low_halves(first, from[1]) : first;
  }
}

// Of all words seen, whether one is not finite, of which infinity does no harm: `poisoned` asks for a closer look. Two
// chains, as each is as long as there are words.
template <class T>
struct Probe {
  unsigned chains[2] = {};
  __device__ __forceinline__ void see(unsigned word, int chain) { chains[chain] = probe_pair<T>(chains[chain], word); }
  __device__ __forceinline__ bool poisoned() const { return is_poisoned(chains[0] | chains[1]); }
};

// The rows of a channel of eight images as products take them: wide, a row's first eight columns and the next; narrow,
// two rows.
template <class Traits>
struct InputRows {
  static constexpr int kOperands = Traits::kNarrow ? divide_up(Traits::kHeight, 2) : Traits::kHeight;
  unsigned operand[kOperands][2];

  // `plane`: of the lane's image.
  __device__ __forceinline__ void load(const typename Traits::T* plane) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < kOperands; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Traits::kNarrow ? 2 * k + half : k, first = Traits::kNarrow ? 0 : 8 * half;
        operand[k][half] =
            row < Traits::kHeight ? load_pixels<Traits::kWidth>(plane + row * Traits::kWidth, first + column) : 0;
      }
  }
};

// What a lane has of a warp's channel: the rows of an image, and where it puts its outputs, those of two images.
template <class Traits>
struct LaneImages {
  InputRows<Traits> rows;
  typename Traits::T* stage[2];
};

// kRows rows of outputs of nine to sixteen columns, from kFirst on: a lane has columns 2 g and 2 g + 1 of two images, in
// rows g and g + 8 of a product.
template <int kFirst, int kRows, class Traits>
__device__ __forceinline__ void convolve_wide(const LaneImages<Traits>& images, const Taps<Traits>& taps,
                                              Probe<typename Traits::T>& probe) {
  using T = typename Traits::T;
  const int lane = threadIdx.x % 32, column = lane / 4 * 2, source = Traits::kOwnLane + lane % 4 * 2 - column;
  float sum[kRows][4];
#pragma unroll
  for (int y = 0; y < kRows; ++y)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[y][e] = to_float(taps.bias);
#pragma unroll
  for (int k = Traits::kShifts - 1; k >= 0; --k) {  // this way round needs a few registers less
    const int shift = kFirst + Traits::kFirstShift + k * Traits::kShiftStep;
    if (shift <= -kRows || shift >= Traits::kHeight) continue;
    const unsigned pair = taps.neighbours(k);
    const unsigned band[4] = {__shfl_sync(~0u, pair, source), __shfl_sync(~0u, pair, source - 1),
                              __shfl_sync(~0u, pair, source + 8), __shfl_sync(~0u, pair, source + 7)};
#pragma unroll
    for (int y = 0; y < kRows; ++y)
      if (y + shift >= 0 && y + shift < Traits::kHeight)
        multiply_k16<T>(sum[y], band[0], band[1], band[2], band[3], images.rows.operand[y + shift][0],
                        images.rows.operand[y + shift][1]);
  }
  unsigned word[2][kRows];
#pragma unroll
  for (int image = 0; image < 2; ++image)
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
      word[image][y] = pack<T>(sum[y][image], sum[y][2 + image]);
      probe.see(word[image][y], image);
    }
  const auto stage = [&](int offset, auto store) {
    if (column + offset >= Traits::kOutWidth) return;
#pragma unroll
    for (int image = 0; image < 2; ++image)
#pragma unroll
      for (int y = 0; y < kRows; ++y)
        store(images.stage[image] + (kFirst + y) * Traits::kOutWidth + column + offset, word[image][y]);
  };
  if constexpr (Traits::kOutWidth % 2 == 0) {
    stage(0, [](T* to, unsigned both) { *reinterpret_cast<unsigned*>(to) = both; });
  } else {
    stage(0, [](T* to, unsigned both) { to->bits = static_cast<unsigned short>(both); });
    stage(1, [](T* to, unsigned both) { to->bits = static_cast<unsigned short>(both >> 16); });
  }
}

// Outputs of up to eight columns: a lane has column g of two images and two rows.
template <class Traits>
__device__ __forceinline__ void convolve_narrow(const LaneImages<Traits>& images, const Taps<Traits>& taps,
                                                Probe<typename Traits::T>& probe) {
  using T = typename Traits::T;
  constexpr int kInPairs = InputRows<Traits>::kOperands, kOutPairs = divide_up(Traits::kOutHeight, 2);
  const int lane = threadIdx.x % 32, column = lane / 4, source = Traits::kOwnLane + lane % 4 * 2 - column;
  unsigned banded[Traits::kShifts];
#pragma unroll
  for (int k = 0; k < Traits::kShifts; k += 2) {
    const unsigned pairs = taps.neighbours(k);
    banded[k] = __shfl_sync(~0u, pairs, source);
    if (k + 1 < Traits::kShifts) banded[k + 1] = __shfl_sync(~0u, pairs, source + Traits::kRowLanes);
  }
  float sum[kOutPairs][4];
#pragma unroll
  for (int y = 0; y < kOutPairs; ++y)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[y][e] = to_float(taps.bias);
  // Pairs of output and input rows that are as far apart share the four matrices.
#pragma unroll
  for (int apart = 1 - kOutPairs; apart < kInPairs; ++apart) {
    const int shift = 2 * apart;
    if (!Traits::exists(shift - 1) && !Traits::exists(shift) && !Traits::exists(shift + 1)) continue;
    const auto band = [&](int s) { return Traits::exists(s) ? banded[Traits::index(s)] : 0; };
#pragma unroll
    for (int y = 0; y < kOutPairs; ++y)
      if (y + apart >= 0 && y + apart < kInPairs)
        multiply_k16<T>(sum[y], band(shift), band(shift - 1), band(shift + 1), band(shift),
                        images.rows.operand[y + apart][0], images.rows.operand[y + apart][1]);
  }
  unsigned word[Traits::kOutHeight];  // of both images
#pragma unroll
  for (int y = 0; y < Traits::kOutHeight; ++y) {
    word[y] = pack<T>(sum[y / 2][y % 2 * 2], sum[y / 2][y % 2 * 2 + 1]);
    probe.see(word[y], y % 2);
  }
  if (column >= Traits::kOutWidth) return;
#pragma unroll
  for (int image = 0; image < 2; ++image)
#pragma unroll
    for (int y = 0; y < Traits::kOutHeight; ++y)
      images.stage[image][y * Traits::kOutWidth + column].bits = static_cast<unsigned short>(word[y] >> 16 * image);
}

// Computes the staged outputs that are NaN again, one by one. `at(image, channel, row, column)`: where they are.
template <class Traits, class At>
__device__ __noinline__ void repair_images(typename Traits::T* room, const DirectArgs& args, At at) {
  using T = typename Traits::T;
  constexpr int kWidth = Traits::kOutWidth, kPixels = Traits::kOutHeight * kWidth;
  const ImagesBlock<Traits> block(args);
#pragma unroll 1
  for (int k = threadIdx.x; k < block.images * block.channels * kPixels; k += Traits::kThreads) {
    const int row = k % kPixels / kWidth, column = k % kWidth;
    const int channel = k / kPixels % block.channels, image = k / kPixels / block.channels;
    T& value = room[at(image, channel, row, column)];
    if (is_nan(value))
      value = from_float<T>(toeplitz_exact<Traits>(args, block.image + image, block.channel + channel, row, column));
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    images_kernel(const __grid_constant__ DirectArgs args) {
  using T = typename Traits::T;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const room = reinterpret_cast<T*>(shared_memory);
  const ImagesBlock<Traits> block(args);
  const InPlanes<Traits> in(static_cast<const T*>(args.input), block);
  const OutPlanes<Traits> out(static_cast<T*>(args.out), block);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channel = min(warp, block.channels - 1);  // a warp without one takes another's

  // Load. The first barrier keeps the compiler from putting off the taps until the images are there.
  const auto load_taps = [&] { return Taps<Traits>(args, block.channel + channel); };
  const auto taps = [&] {
    if constexpr (Traits::kChannelsLast) {
      const PixelPairs<Traits, InPlanes<Traits>> pairs(in, block);
      const LoadedPixels<Traits> pixels(pairs, in.first);
      const Taps<Traits> loaded = load_taps();
      __syncthreads();
      pixels.store(pairs, room);
      return loaded;
    } else {
      copy_images<Traits>(room, in, block);
      const Taps<Traits> loaded = load_taps();
      __syncthreads();
      return loaded;
    }
  }();
  wait_for_all_copies();

  LaneImages<Traits> images;
  const int image = min(lane / 4, block.images - 1);  // a lane without one takes another's
  images.rows.load(room + in.at(image, channel));
#pragma unroll
  for (int k = 0; k < 2; ++k) images.stage[k] = room + out.at(lane % 4 * 2 + k, warp);
  __syncthreads();  // the outputs take the room of the images

  Probe<T> probe;
  if constexpr (Traits::kNarrow)
    convolve_narrow<Traits>(images, taps, probe);
  else
    for_each_index<divide_up(Traits::kOutHeight, Traits::kRoundRows)>([&](auto round) {
      constexpr int kFirst = decltype(round)::value * Traits::kRoundRows;
      convolve_wide<kFirst, min_int(Traits::kRoundRows, Traits::kOutHeight - kFirst)>(images, taps, probe);
    });

  if (__syncthreads_or(probe.poisoned())) {
    repair_images<Traits>(room, args, [&args](int image, int channel, int row, int column) {
      // Not `out`, which would cost registers until then.
      const OutPlanes<Traits> planes(static_cast<T*>(args.out), ImagesBlock<Traits>(args));
      return planes.at(image, channel) + row * Traits::kOutWidth + column;
    });
    __syncthreads();
  }
  if constexpr (Traits::kChannelsLast)
    store_pixels<Traits>(room, out, block);
  else
    store_images<Traits>(room, out, block);
}

template <class Traits>
int launch_images(const DirectArgs& args, int, cudaStream_t stream) {
  constexpr int kBytes = 2 * max_int(InPlanes<Traits>::kRoom, OutPlanes<Traits>::kRoom);
  if (kBytes > device_limits().shared_bytes_block) return kTooLittleSharedMemory;
  if (const int error = allow_shared_bytes(images_kernel<Traits>, kBytes)) return error;
  const dim3 blocks(static_cast<unsigned>(divide_up<int64_t>(args.out_c, Traits::kChannels)),
                    static_cast<unsigned>(divide_up<int64_t>(args.n, Traits::kImages)));
  images_kernel<Traits><<<blocks, Traits::kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace depthwise
