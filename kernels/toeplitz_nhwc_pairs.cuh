// How blocks of toeplitz_nhwc.cuh work in pairs, compiled for sm_90.
//
// Idea    Eight channels are half of a sector, and stores of halves take more than twice as long as of whole ones (H100, fp16,
//         32x128x56x56, all blocks at once: 31.3 us, of 32 bytes 14.1). So two blocks of neighbouring channels, a cluster,
//         store 32 bytes of a pixel at once, for half of the rows each: a block sends the other half of its outputs, as
//         pixels, to the other's shared memory.
// Serves  an even number of groups of eight channels: of an odd number, every second pixel begins in the middle of a sector.
//         Pairs of these, and blocks of the last group alone, were no gain (13x13 on 32x200x20x20: 22.3 us for 22.0; 29x29 on
//         16x200x48x48: 64.9 for 64.5) or a loss (31x31 on 8x40x96x96: 36.6 for 35.2). On sm_100, where nothing is measured,
//         the widest tiles would have too few registers (31x31 on 56x56).
// Order   The inbox lies where a block's input was, behind its staged outputs. A block sends when both are done with their
//         products, and stores when both have sent: a barrier of the cluster each. It sends again when both are done with
//         the products after that, before which both have stored.
#pragma once

#include "toeplitz_nhwc_pixels.cuh"

namespace depthwise {

template <class Traits>
struct PairedToeplitzTraits : Traits {
  static constexpr bool kPaired = true;
};
template <class Traits>
struct WeightOf<PairedToeplitzTraits<Traits>> : WeightOf<Traits> {};

template <class Traits>
struct ToeplitzPair {
  static constexpr int kAtOnce = 2;  // chunks of a lane that are on their way together
  static constexpr int kInboxChunks = kTileRows / 2 * Traits::kStagePitch * kChunk;  // an item's, from the other block

  int rank;
  int first_stored, end_stored, first_sent, end_sent;  // chunks of the outputs

  __device__ __forceinline__ explicit ToeplitzPair(const ToeplitzUnit<Traits>& unit) {
    const int middle = (unit.rows + 1) / 2 * Traits::kStagePitch, end = unit.rows * Traits::kStagePitch;
    rank = static_cast<int>(blockIdx.x) % 2;
    first_stored = rank == 0 ? 0 : middle, end_stored = rank == 0 ? middle : end;
    first_sent = rank == 0 ? middle : 0, end_sent = rank == 0 ? end : middle;
  }

  // What the other block stores, to its inbox.
  __device__ __forceinline__ void send(const typename Traits::T* staged, const ToeplitzNhwcTiling& tiling,
                                       const typename Traits::T* inbox) const {
    const unsigned to = ptx::address_in_cluster(ptx::shared_address(inbox), rank ^ 1);
    const int pixel = ptx::lane_index() / 4;
    for_each_chunk<Traits, kAtOnce>(staged, tiling.stage, first_sent, end_sent, [&](int chunk, const auto& outputs) {
      if (chunk < end_sent)
        ptx::store_in_cluster(to + ((chunk - first_sent) * kChunk + pixel) * kChunkBytes, outputs.word);
    });
  }

  // Two lanes store two pixels, of both blocks' channels: first the pixel of the lane whose number is even.
  __device__ __forceinline__ void store(const typename Traits::T* staged, const DirectArgs& args,
                                        const ToeplitzNhwcTiling& tiling, const ToeplitzUnit<Traits>& unit,
                                        const typename Traits::T* inbox) const {
    using T = typename Traits::T;
    const int odd = ptx::lane_index() % 2, pixel = ptx::lane_index() / 4;
    const int columns = min(Traits::kColumns, args.out_w - unit.column);
    const int own = static_cast<int>(first_channel<Traits>()), other = own ^ Traits::kChannels;
    T* const out = static_cast<T*>(args.out) + (static_cast<int64_t>(unit.image) * args.out_h * args.out_w +
                                                pixel_at<Traits>(unit.row, unit.column, args.out_h, args.out_w)) *
                                                   args.out_c;
    const auto store_two = [&](int chunk, const auto& outputs) {
      const int even_chunk = chunk - odd, other_chunk = even_chunk + 1 - odd;
      uint4 others{};
      if (other_chunk < end_stored)
        others = *reinterpret_cast<const uint4*>(inbox + ((other_chunk - first_stored) * kChunk + pixel) * kChunk);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int stored = even_chunk + k, row = stored / Traits::kStagePitch;
        const int column = (stored - row * Traits::kStagePitch) * kChunk + pixel;
        const bool mine = k == odd;
        if (stored < end_stored && column < columns)
          __stcs(reinterpret_cast<uint4*>(out + pixel_at<Traits>(row, column, args.out_h, args.out_w) * args.out_c +
                                          (mine ? own : other)),
                 mine ? outputs.word : others);
      }
    };
    for_each_chunk<Traits, kAtOnce>(staged, tiling.stage, first_stored, end_stored, store_two);
  }
};

}  // namespace depthwise
