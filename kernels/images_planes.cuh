// The planes of a block of images.cuh, between global and shared memory.
//
// NCHW          an image's channels lie one after the other, in granules of 16 bytes as in global memory, so that a run
//               of channels is copied as it is, wherever it begins. Asynchronously: nothing waits for a register.
// channels_last a thread turns two neighbouring pixels of eight channels into eight words, and back.
#pragma once

#include "async_copy.cuh"
#include "direct.cuh"
#include "images_tiling.h"

namespace depthwise {

// What a block computes: its first image and channel, and how many there are.
template <class Traits>
struct ImagesBlock {
  int image, images, channel, channels, all_channels;

  __device__ explicit ImagesBlock(const DirectArgs& args) : all_channels(static_cast<int>(args.out_c)) {
    channel = blockIdx.x * Traits::kChannels;
    image = blockIdx.y * Traits::kImages;
    channels = min(Traits::kChannels, all_channels - channel);
    images = min(Traits::kImages, static_cast<int>(args.n) - image);
  }
};

// The planes of a block in a tensor, and how they lie in shared memory. NCHW: an image's channels one after the other as
// in global memory, after what precedes them in their first granule of 16 bytes. channels_last: channel by channel, each
// on a word's boundary. Images are apart by an odd number of four words, so that eight of them are in different banks.
template <class Traits, int kPixels_, class T>
struct Planes {
  static constexpr int kPixels = kPixels_;
  static constexpr int kPlanePitch = plane_pitch(kPixels, Traits::kChannelsLast);
  static constexpr int kImagePitch = planes_pitch(Traits::kChannels, kPixels, Traits::kChannelsLast);
  static constexpr int kRoom = Traits::kImages * kImagePitch;

  T* first;        // the block's first channel of its first image
  int64_t stride;  // from image to image

  __device__ Planes(T* tensor, const ImagesBlock<Traits>& block) {
    stride = static_cast<int64_t>(block.all_channels) * kPixels;
    first = tensor + block.image * stride + static_cast<int64_t>(block.channel) * (Traits::kChannelsLast ? 1 : kPixels);
  }
  // The elements that precede an image in its first granule.
  __device__ __forceinline__ int head(int image) const {
    if (Traits::kChannelsLast) return 0;
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(first) / sizeof(T) + image * stride) % kGranule;
  }
  // An image's channel in shared memory.
  __device__ __forceinline__ int at(int image, int channel) const {
    return image * kImagePitch + head(image) + channel * kPlanePitch;
  }
};
template <class Traits>
using InPlanes = Planes<Traits, Traits::kPixels, const typename Traits::T>;
template <class Traits>
using OutPlanes = Planes<Traits, Traits::kOutPixels, typename Traits::T>;

// NCHW: for the images of a warp, full(shared, global) of each granule inside its run of channels, and rest(shared,
// global, first, end) for those elements of a granule that share it with other runs.
template <class Traits, class Planes, class T, class Full, class Rest>
__device__ __forceinline__ void for_each_granule(T* room, const Planes& planes, const ImagesBlock<Traits>& block,
                                                 Full full, Rest rest) {
  constexpr int kElements = Traits::kChannels * Planes::kPixels, kStep = 32 * kGranule;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (kElements % kGranule == 0 && planes.head(0) == 0 && planes.stride % kGranule == 0 &&
      block.channels == Traits::kChannels) {  // all runs are whole granules, and as many as is known when compiled
    auto* global = ptx::opaque(planes.first + warp * planes.stride + lane * kGranule);
    T* const shared = room + warp * Planes::kImagePitch + lane * kGranule;
#pragma unroll
    for (int image = 0; image < Traits::kImages; image += Traits::kWarps) {
      if (image + warp >= block.images) break;
#pragma unroll
      for (int at = 0; at < kElements; at += kStep)
        if (at + kStep <= kElements || at + lane * kGranule < kElements)
          full(shared + image * Planes::kImagePitch + at, global + at);
      global += Traits::kWarps * planes.stride;
    }
    return;
  }
#pragma unroll 1
  for (int image = warp; image < block.images; image += Traits::kWarps) {
    const int head = planes.head(image), end = head + block.channels * Planes::kPixels;
    const int begin = head == 0 ? 0 : kGranule, last = max(begin, end / kGranule * kGranule);
    const auto global = planes.first + image * planes.stride - head;
    T* const shared = room + image * Planes::kImagePitch;
#pragma unroll 1
    for (int at = begin + lane * kGranule; at + kGranule <= end; at += kStep) full(shared + at, global + at);
    if (lane == 0 && head != 0) rest(shared, global, head, min(kGranule, end));
    if (lane == 1 && last < end) rest(shared + last, global + last, 0, end - last);
  }
}

template <class Traits>
__device__ __forceinline__ void copy_images(typename Traits::T* room, const InPlanes<Traits>& planes,
                                            const ImagesBlock<Traits>& block) {
  using T = typename Traits::T;
  for_each_granule(
      room, planes, block, [](T* to, const T* from) { copy_async<16>(to, from); },
      [](T* to, const T* from, int, int end) { copy_16_async(to, from, end * int{sizeof(T)}); });
}

template <class Traits>
__device__ __forceinline__ void store_images(typename Traits::T* room, const OutPlanes<Traits>& planes,
                                             const ImagesBlock<Traits>& block) {
  using T = typename Traits::T;
  for_each_granule(
      room, planes, block,
      [](T* from, T* to) { store_streaming(to, *reinterpret_cast<const Vector<T, kGranule>*>(from)); },
      [](T* from, T* to, int first, int end) {
#pragma unroll 1
        for (int e = first; e < end; ++e) to[e] = from[e];
      });
}

// The low halves of two words, and the high ones.
__device__ __forceinline__ unsigned low_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ unsigned high_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }

// channels_last: two neighbouring pixels of eight channels, which in shared memory are a word of each of eight planes,
// kPlanePitch elements apart.
struct PixelPair {
  uint4 left, right;

  template <int kPlanePitch, class T>
  __device__ __forceinline__ static PixelPair load_words(const T* shared) {
    unsigned word[kGranule];
#pragma unroll
    for (int e = 0; e < kGranule; ++e) word[e] = *reinterpret_cast<const unsigned*>(shared + e * kPlanePitch);
    return {{low_halves(word[0], word[1]), low_halves(word[2], word[3]), low_halves(word[4], word[5]),
             low_halves(word[6], word[7])},
            {high_halves(word[0], word[1]), high_halves(word[2], word[3]), high_halves(word[4], word[5]),
             high_halves(word[6], word[7])}};
  }
  template <int kPlanePitch, class T>
  __device__ __forceinline__ void store_words(T* shared) const {
    const unsigned a[4] = {left.x, left.y, left.z, left.w}, b[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
    for (int e = 0; e < kGranule; ++e)
      *reinterpret_cast<unsigned*>(shared + e * kPlanePitch) =
          e % 2 == 0 ? low_halves(a[e / 2], b[e / 2]) : high_halves(a[e / 2], b[e / 2]);
  }
};

// channels_last: the pairs of pixels that a thread moves between global and shared memory: all of one image.
template <class Traits, class Planes>
struct PixelPairs {
  static constexpr int kEights = Traits::kChannels / kGranule, kStep = Traits::kThreads / Traits::kImages / kEights;
  static constexpr int kPairs = divide_up(Planes::kPixels, 2), kSteps = divide_up(kPairs, kStep);
  int first, shared;  // the thread's first pair; its word in shared memory, of the first channel
  unsigned all_channels;
  int64_t global;
  bool exist;

  __device__ __forceinline__ PixelPairs(const Planes& planes, const ImagesBlock<Traits>& block) {
    const int channel = threadIdx.x % kEights * kGranule, image = threadIdx.x / (kStep * kEights);
    first = threadIdx.x / kEights % kStep;
    all_channels = block.all_channels;
    exist = image < block.images && channel < block.channels;
    global = static_cast<uint64_t>(image * Planes::kPixels + 2 * first) * all_channels + channel;
    shared = planes.at(image, channel) + 2 * first;
  }
  // Calls body(k, offset in global memory, offset in shared memory, whether both pixels exist) for each pair.
  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int pair = first + k * kStep;
      if (exist && (pair < kPairs || (k + 1) * kStep <= kPairs))
        body(k, global + static_cast<uint64_t>(2 * k * kStep) * all_channels, shared + 2 * k * kStep,
             Planes::kPixels % 2 == 0 || 2 * pair + 1 < Planes::kPixels);
    }
  }
};

template <class Traits>
struct LoadedPixels {
  using T = typename Traits::T;
  using Pairs = PixelPairs<Traits, InPlanes<Traits>>;
  PixelPair pixels[Pairs::kSteps];

  // Plain loads, which come before a barrier that comes after them.
  __device__ __forceinline__ LoadedPixels(const Pairs& pairs, const T* input) {
    pairs.for_each([&](int k, int64_t global, int, bool both) {
      pixels[k].left = *reinterpret_cast<const uint4*>(input + global);
      pixels[k].right = both ? *reinterpret_cast<const uint4*>(input + global + pairs.all_channels) : uint4{};
    });
  }
  __device__ __forceinline__ void store(const Pairs& pairs, T* room) const {
    pairs.for_each([&](int k, int64_t, int shared, bool) {
      pixels[k].template store_words<InPlanes<Traits>::kPlanePitch>(room + shared);
    });
  }
};

template <class Traits>
__device__ __forceinline__ void store_pixels(const typename Traits::T* room, const OutPlanes<Traits>& planes,
                                             const ImagesBlock<Traits>& block) {
  const PixelPairs<Traits, OutPlanes<Traits>> pairs(planes, block);
  pairs.for_each([&](int, int64_t global, int shared, bool both) {
    const PixelPair pixels = PixelPair::load_words<OutPlanes<Traits>::kPlanePitch>(room + shared);
    auto* const to = planes.first + global;
    __stcs(reinterpret_cast<uint4*>(to), pixels.left);
    if (both) __stcs(reinterpret_cast<uint4*>(to + pairs.all_channels), pixels.right);
  });
}

}  // namespace depthwise
