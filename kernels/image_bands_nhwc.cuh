// Depthwise convolution of images of up to sixteen rows and columns on the tensor cores, channels_last: forward, and grad
// of input at stride 1 (filter flipped). fp16 and bf16, fp32 accumulators. For kernels of few rows; images.cuh takes others.
//
// Idea    That of images.cuh, a product D[16][8] += A[16][16] * B[16][8] of a kernel row's banded matrix A, but the eight
//         columns are two bands of rows of four images: row y of the upper half of the outputs and of the lower half. A
//         block is then half as large, so that more of them overlap their loads, products and stores, and a thread has
//         half the sums. Rows of padding that the other band does not have are multiplied: 14x14 outputs of 5x5 take 70
//         products for eight images, where whole images take 64; 38% of the multiplies are useful.
// Serves  any number of images, a multiple of eight channels, any kernel width, padding and dilation of columns at run
//         time; compile-time are the type, the sizes of both images, and which rows meet.
// Owns    a block takes four images of sixteen channels, whose pixels are whole sectors; a warp kRounds channels, one after
//         the other. A lane moves two neighbouring pixels of eight channels at a time, as eight words, and back.
// Memory  planes of rows of sixteen columns, zeros beyond the image's, for ldmatrix; in the same place the outputs. For 14x14
//         30 KB. A band's rows lie 16 bytes beside a multiple of 32 from the other's, images 32 bytes beside one of 64: a
//         matrix, which is a row of each, meets every bank once. So do the stores of a row of four images, and the words of
//         channels eight apart.
// NaN     As in images.cuh.
// Chosen  select.h.
#pragma once

#include "cache_policy.cuh"
#include "images.cuh"

namespace depthwise {

template <class T_, int kHeight_, int kWidth_, int kOutHeight_, int kOutWidth_, int kFirstShift_, int kShifts_,
          int kShiftStep_>
struct ImageBandsTraits {
  using T = T_;
  static constexpr int kHeight = kHeight_, kWidth = kWidth_, kOutHeight = kOutHeight_, kOutWidth = kOutWidth_;
  static constexpr int kFirstShift = kFirstShift_, kShifts = kShifts_, kShiftStep = kShiftStep_;
  static constexpr int kStrideW = 1;
  static constexpr bool kChannelsLast = true;
  static constexpr int kImages = kImagesTogether / kImageBands, kChannels = kImageBandsChannels;
  static constexpr int kEights = kChannels / kGranule, kRounds = 2, kWarps = kChannels / kRounds,
                       kThreads = 32 * kWarps;

  // For Taps.
  static constexpr bool kNarrow = false;
  static constexpr int kRowLanes = 32, kOwnLane = 15;

  // Rows of outputs of a band; rows of input that it meets, of which two are an ldmatrix.
  static constexpr int kRows = divide_up(kOutHeight, kImageBands);
  static constexpr int kInRows = image_bands_rows(kOutHeight, kShifts, kShiftStep);
  static constexpr int kInPairs = divide_up(kInRows, 2);
#if __CUDA_ARCH__ >= 800
  static constexpr int kMinBlocks =
      max_int(1, (64 << 10) / (kThreads * image_bands_registers(kOutHeight, kShifts, kShiftStep)));
#else
  static constexpr int kMinBlocks = 1;
#endif

  // Elements of shared memory. Behind the planes of eight channels of the first image lie eight zeros.
  static constexpr int kRowPitch = kMaxImageSize, kBandGap = kGranule;
  static constexpr int kPlanePitch = max_int(kHeight, kOutHeight) * kRowPitch + kBandGap;
  static constexpr int kZeros = kGranule * kPlanePitch, kEightPitch = kZeros + 4 * kGranule;
  static constexpr int kImagePitch = kEights * kEightPitch - 2 * kGranule;
  static constexpr int kBytes = kImages * kImagePitch * int{sizeof(T)};
  static_assert(kEights == 2 && kImagePitch / kGranule % 4 == 2);

  // Where a row of a channel begins, from the image's first.
  __device__ static constexpr int row_at(int channel, int row) {
    return channel * kPlanePitch + channel / kGranule * (kEightPitch - kZeros) + row * kRowPitch +
           (row >= kRows ? kBandGap : 0);
  }
};

// The pairs of pixels of planes of kPlaneHeight x kPlaneWidth that a thread moves, of eight channels: of columns `column`
// and the next, also beyond the image's last. A warp takes two rows at a time.
template <class Traits, int kPlaneHeight, int kPlaneWidth>
struct BandPairs {
  static constexpr int kRowPairs = divide_up(kPlaneHeight, 2), kUnits = Traits::kImages * kRowPairs;
  static constexpr int kSteps = divide_up(kUnits, Traits::kWarps);
  static constexpr int kPlanePixels = kPlaneHeight * kPlaneWidth;
  int channel, column, row_of_two, images;
  unsigned all_channels;
  bool exist;

  __device__ __forceinline__ explicit BandPairs(const ImagesBlock<Traits>& block) {
    const int lane = threadIdx.x % 32;
    channel = lane % Traits::kEights * kGranule;
    column = lane / Traits::kEights % 8 * 2;
    row_of_two = lane / (8 * Traits::kEights);
    images = block.images;
    all_channels = block.all_channels;
    exist = channel < block.channels && column < kPlaneWidth;
  }
  // The tensor, from the first pixel of the block's first image on.
  template <class T>
  __device__ __forceinline__ static T* first(T* tensor, const ImagesBlock<Traits>& block) {
    return tensor + static_cast<int64_t>(block.image) * kPlanePixels * block.all_channels + block.channel;
  }
  // Calls body(k, offset in global memory, offset in shared memory, whether the first pixel exists) for the rows of all
  // images that a block may have.
  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    constexpr unsigned kFactor = (1 << 16) / kRowPairs + 1;
    const unsigned warp = threadIdx.x / 32;
#pragma unroll
    for (unsigned k = 0; k < kSteps; ++k) {
      const unsigned unit = k * Traits::kWarps + warp, image = unit * kFactor >> 16;
      const unsigned row = (unit - image * kRowPairs) * 2 + row_of_two;
      if ((k + 1) * Traits::kWarps > kUnits && unit >= kUnits) break;
      if (kPlaneHeight % 2 != 0 && row >= kPlaneHeight) continue;
      body(k, ((image * kPlaneHeight + row) * kPlaneWidth + column) * all_channels + channel,
           image * Traits::kImagePitch + Traits::row_at(channel, row) + column, exist && image < images);
    }
  }
};

template <class Traits>
struct LoadedBands {
  using T = typename Traits::T;
  using Pairs = BandPairs<Traits, Traits::kHeight, Traits::kWidth>;
  PixelPair pixels[Pairs::kSteps];

  // Plain loads, which come before a barrier that comes after them; zeros beyond the image.
  __device__ __forceinline__ LoadedBands(const Pairs& pairs, const T* input, CachePolicy policy) {
    pairs.for_each([&](int k, unsigned global, int, bool exists) {
      pixels[k].left = pixels[k].right = uint4{};
      if (exists) pixels[k].left = policy.load_in_order(reinterpret_cast<const uint4*>(input + global));
      if (exists && (Traits::kWidth % 2 == 0 || pairs.column + 1 < Traits::kWidth))
        pixels[k].right = policy.load_in_order(reinterpret_cast<const uint4*>(input + global + pairs.all_channels));
    });
  }
  __device__ __forceinline__ void store(const Pairs& pairs, T* room) const {
    pairs.for_each(
        [&](int k, unsigned, int shared, bool) { pixels[k].template store_words<Traits::kPlanePitch>(room + shared); });
  }
};

template <class Traits>
__device__ __forceinline__ void store_image_bands(const typename Traits::T* room, typename Traits::T* tensor,
                                                  const ImagesBlock<Traits>& block) {
  using T = typename Traits::T;
  const BandPairs<Traits, Traits::kOutHeight, Traits::kOutWidth> pairs(block);
  T* const out = pairs.first(tensor, block);
  pairs.for_each([&](int, unsigned global, int shared, bool exists) {
    const PixelPair pixels = PixelPair::load_words<Traits::kPlanePitch>(room + shared);
    if (exists) __stcs(reinterpret_cast<uint4*>(out + global), pixels.left);
    if (exists && (Traits::kOutWidth % 2 == 0 || pairs.column + 1 < Traits::kOutWidth))
      __stcs(reinterpret_cast<uint4*>(out + global + pairs.all_channels), pixels.right);
  });
}

// A channel of all images: reads its planes at address[.] + `offset` and puts its outputs there, at `stage`.
template <class Traits>
__device__ __forceinline__ void convolve_image_bands(const unsigned (&address)[Traits::kInPairs], unsigned offset,
                                                     typename Traits::T* stage, const Taps<Traits>& taps,
                                                     Probe<typename Traits::T>& probe) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows;
  const int lane = threadIdx.x % 32, column = lane / 4 * 2, source = Traits::kOwnLane + lane % 4 * 2 - column;
  unsigned operand[Traits::kInPairs][4];
#pragma unroll
  for (int k = 0; k < Traits::kInPairs; ++k) ptx::load_matrices(operand[k], address[k] + offset);
  __syncwarp();  // the outputs take the room of the images
  float sum[kRows][4];
#pragma unroll
  for (int y = 0; y < kRows; ++y)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[y][e] = to_float(taps.bias);
#pragma unroll
  for (int k = 0; k < Traits::kShifts; ++k) {
    const unsigned pair = taps.neighbours(k);
    const unsigned band[4] = {__shfl_sync(~0u, pair, source), __shfl_sync(~0u, pair, source - 1),
                              __shfl_sync(~0u, pair, source + 8), __shfl_sync(~0u, pair, source + 7)};
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
      const int row = y + k * Traits::kShiftStep, in_row = Traits::kFirstShift + row;  // of the upper band
      if (in_row + kRows < 0 || in_row >= Traits::kHeight) continue;
      multiply_k16<T>(sum[y], band[0], band[1], band[2], band[3], operand[row / 2][row % 2 * 2],
                      operand[row / 2][row % 2 * 2 + 1]);
    }
  }
  // A lane has columns 2 g and 2 g + 1 of both bands of an image.
#pragma unroll
  for (int band = 0; band < kImageBands; ++band)
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
      const int row = band * kRows + y;
      if (row >= Traits::kOutHeight) continue;
      const unsigned word = pack<T>(sum[y][band], sum[y][2 + band]);
      probe.see(word, band);
      if (column < Traits::kOutWidth) *reinterpret_cast<unsigned*>(stage + Traits::row_at(0, row) + column) = word;
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    image_bands_nhwc_kernel(const __grid_constant__ DirectArgs args) {
  using T = typename Traits::T;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const room = reinterpret_cast<T*>(shared_memory);
  const ImagesBlock<Traits> block(args);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Load; the first barrier keeps the compiler from putting off the taps until the images are there.
  using Pairs = typename LoadedBands<Traits>::Pairs;
  static_assert(Traits::kRounds == 2 && Traits::kWarps == kGranule);
  const Pairs pairs(block);
  const LoadedBands<Traits> pixels(pairs, pairs.first(static_cast<const T*>(args.input), block), CachePolicy(args));
  __syncwarp();
  const int channel = ptx::opaque(block.channel + warp);  // what follows from it is computed when pixels are under way
  const Taps<Traits> taps[Traits::kRounds] = {
      {args, channel}, {args, min(channel + Traits::kWarps, block.channel + block.channels - 1)}};
  if (threadIdx.x < Traits::kEights)
    *reinterpret_cast<uint4*>(room + threadIdx.x * Traits::kEightPitch + Traits::kZeros) = uint4{};
  __syncthreads();
  pixels.store(pairs, room);

  // Where the lane's rows of the matrices lie: of image n / 2, band n % 2, the columns' halves and two rows.
  const int n = lane % 8;
  const int first_row = n % kImageBands * Traits::kRows + Traits::kFirstShift + lane / 16;
  const T* const plane = room + n / kImageBands * Traits::kImagePitch + lane / 8 % 2 * kGranule;
  unsigned address[Traits::kInPairs];
#pragma unroll
  for (int k = 0; k < Traits::kInPairs; ++k) {
    const int row = first_row + 2 * k;
    address[k] = ptx::shared_address(static_cast<unsigned>(row) < static_cast<unsigned>(Traits::kHeight)
                                         ? plane + Traits::row_at(warp, row)
                                         : room + Traits::kZeros);
  }
  __syncthreads();

  Probe<T> probe;
  T* const stage = room + lane % 4 * Traits::kImagePitch + Traits::row_at(warp, 0);
#pragma unroll
  for (int round = 0; round < Traits::kRounds; ++round) {
    const int offset = round * Traits::kEightPitch;
    if (round * Traits::kWarps < block.channels)
      convolve_image_bands<Traits>(address, offset * sizeof(T), stage + offset, taps[round], probe);
  }

  if (__syncthreads_or(probe.poisoned())) {
    repair_images<Traits>(room, args, [](int image, int channel, int row, int column) {
      return image * Traits::kImagePitch + Traits::row_at(channel, row) + column;
    });
    __syncthreads();
  }
  store_image_bands<Traits>(room, static_cast<T*>(args.out), block);
}

template <class Traits>
int launch_image_bands_nhwc(const DirectArgs& args, int, cudaStream_t stream) {
  static_assert(Traits::kBytes <= 48 << 10);
  const DirectArgs evicting = with_policy(args, sizeof(typename Traits::T));
  const dim3 blocks(static_cast<unsigned>(divide_up<int64_t>(args.out_c, Traits::kChannels)),
                    static_cast<unsigned>(divide_up<int64_t>(args.n, Traits::kImages)));
  image_bands_nhwc_kernel<Traits><<<blocks, Traits::kThreads, Traits::kBytes, stream>>>(evicting);
  return cudaGetLastError();
}

}  // namespace depthwise
