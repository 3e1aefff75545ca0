// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The product for tokens that share experts, on devices with matrix instructions and asynchronous
// copies: one wave multiplies R * kRowsPerWave rows of packed weights over a range of k, for one
// item after another. An item is an expert with up to 8 * NB of the pairs (token, t) that picked
// it. The pairs are the columns of the matrix instruction, so an expert's weights are read once for
// all of them. All items form one stream of windows of group_window_blocks(R) blocks. While one is
// multiplied, kGroupRing - 1 are being copied to LDS. The stream does not stop between items.
//
// LDS layout of a block of weights: the 16 bytes with the 32 weights of row g, unit j of 4, are at
// position 4 * g + (j ^ g / 2), so copies and loads of neighbouring lanes use different banks. A
// lane multiplies word t of a unit, so one pair of matrix instructions covers 32 weights of one
// group.
#pragma once

#include "slots.cuh"
#include "wave_tile.cuh"

namespace moe_int4 {

// A pair: the token, counted from the block's first, and t.
struct Pair {
  uint16_t bits;
  static constexpr int kTBits = 10;
  GPU_DEVICE int token() const { return bits >> kTBits; }
  GPU_DEVICE int t() const { return bits & ((1 << kTBits) - 1); }
};
static_assert(kGroupTokens << Pair::kTBits <= 1 << 16 && kMaxGroupTopK <= 1 << Pair::kTBits);

// The pairs of a block of tokens by expert: list i of `count` belongs to experts[i] and has
// pairs[starts[i]] .. pairs[starts[i + 1] - 1], ordered by token, then t. An expert with more pairs
// than fit in a list has several adjacent lists, so that they also run at the same time.
struct PairLists {
  const Pair* pairs;
  const uint16_t* experts;
  const uint16_t* starts;
  int count;
};

// Sorts the pairs of local experts into lists of up to `slots`; experts are in the order of their
// first pair. All threads of the block must call it. `lds` has group_list_bytes().
GPU_DEVICE PairLists sort_pairs(const Router& router, int first_token, int tokens, int slots,
                                int waves, char* lds) {
  constexpr uint16_t kNone = 0xffff;
  const int pairs = tokens * router.top_k;
  const int most = pairs < router.num_experts ? pairs : router.num_experts;
  auto* const count = reinterpret_cast<uint32_t*>(lds);
  uint32_t* const place = count + 1;  // per pair: its expert, then slot << 16 | rank
  auto* const sorted = reinterpret_cast<Pair*>(place + pairs);
  auto* const slot_of = reinterpret_cast<uint16_t*>(sorted + pairs);  // [num_experts]
  uint16_t* const expert_of = slot_of + router.num_experts;           // [most], per slot
  uint16_t* const counts = expert_of + most;                          // pairs per slot
  uint16_t* const slot_starts = counts + most;
  uint16_t* const starts = slot_starts + most;  // [lists + 1]
  uint16_t* const experts = starts + most_lists(pairs, router.num_experts, slots) + 1;
  const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane(), threads = waves * gpu::kWaveSize;
  GPU_ROLLED
  for (int p = thread; p < pairs; p += threads) {
    const int token = p / router.top_k;
    const int id = router.id(first_token + token, p - token * router.top_k);
    place[p] = static_cast<uint32_t>(router.local_expert(id));
  }
  GPU_ROLLED
  for (int e = thread; e < router.num_experts; e += threads) slot_of[e] = kNone;
  gpu::block_barrier();

  if (gpu::wave() == 0) {
    const uint32_t below = (1u << gpu::lane()) - 1;
    int distinct = 0;
    GPU_ROLLED
    for (int base = 0; base < pairs; base += gpu::kWaveSize) {
      const int p = base + gpu::lane();
      const int expert = p < pairs ? static_cast<int>(place[p]) : -1;
      const uint32_t same = gpu::lanes_equal(expert);
      const int leader = gpu::first_bit(same);
      const bool leads = expert >= 0 && leader == gpu::lane();
      int slot = leads ? slot_of[expert] : 0;
      const bool fresh = leads && slot == kNone;
      const uint32_t all_fresh = gpu::wave_ballot(fresh);
      if (fresh) {
        slot = distinct + gpu::count_bits(all_fresh & below);
        slot_of[expert] = static_cast<uint16_t>(slot);
        expert_of[slot] = static_cast<uint16_t>(expert);
      }
      const int before = leads && !fresh ? counts[slot] : 0;
      if (leads) counts[slot] = static_cast<uint16_t>(before + gpu::count_bits(same));
      const int rank = gpu::shuffle(before, leader) + gpu::count_bits(same & below);
      slot = gpu::shuffle(slot, leader);
      if (expert >= 0) place[p] = static_cast<uint32_t>(slot) << 16 | static_cast<uint32_t>(rank);
      distinct += gpu::count_bits(all_fresh);
      gpu::wave_barrier();
    }
    int total = 0;  // pairs, and lists << 16
    GPU_ROLLED
    for (int base = 0; base < distinct; base += gpu::kWaveSize) {
      const int d = base + gpu::lane(), own = d < distinct ? counts[d] : 0;
      const int both = own + ((own + slots - 1) / slots << 16);
      int sum = both;
      GPU_UNROLL
      for (int step = 1; step < gpu::kWaveSize; step *= 2) {
        const bool has = gpu::lane() >= step;
        const int other = gpu::shuffle(sum, has ? gpu::lane() - step : 0);
        if (has) sum += other;
      }
      const int before = total + sum - both;
      if (d < distinct) {
        slot_starts[d] = static_cast<uint16_t>(before & 0xffff);
        int list = before >> 16;
        for (int done = 0; done < own; done += slots, ++list) {
          starts[list] = static_cast<uint16_t>((before & 0xffff) + done);
          experts[list] = expert_of[d];
        }
      }
      total += gpu::shuffle(sum, gpu::kWaveSize - 1);
    }
    if (gpu::lane() == 0) {
      starts[total >> 16] = static_cast<uint16_t>(total & 0xffff);
      *count = static_cast<uint32_t>(total >> 16);
    }
  }
  gpu::block_barrier();

  GPU_ROLLED
  for (int p = thread; p < pairs; p += threads) {
    const uint32_t at = place[p];
    if (at == ~0u) continue;
    const int token = p / router.top_k, t = p - token * router.top_k;
    sorted[slot_starts[at >> 16] + (at & 0xffff)] = {
        static_cast<uint16_t>(token << Pair::kTBits | t)};
  }
  gpu::block_barrier();
  return {sorted, experts, starts, static_cast<int>(*count)};
}

// An expert, pairs[first] .. pairs[first + count - 1], and the lane's row in the first row set.
struct GroupItem {
  int expert, first, count, row;
};

// One list with `tiles_left` tiles of rows, `step` rows apart.
struct RowTiles {
  GroupItem item;
  int step, tiles_left;

  GPU_DEVICE bool next(GroupItem& out) {
    out = item;
    item.row += step;
    return tiles_left-- > 0;
  }
};

// Positions of the wave's row sets, which come in pairs: set r starts `pair` * (r / 2) rows after
// the first set, and the second set of a pair another `second` rows later. Rows from `limit` on
// repeat the last row before. The second set of a pair is also `stack` further. Within a set,
// neighbouring lane_row() are `lane_step` rows apart.
struct RowSets {
  int pair, second, limit, stack, lane_step;
  GPU_DEVICE int shift(int r) const { return pair * (r / 2) + second * (r % 2); }
  GPU_DEVICE int row(int first, int r) const {
    const int row = first + shift(r);
    return (row < limit ? row : limit - 1) + stack * (r % 2);
  }
  // The row's nibble in a word of zero points. The sets of a wave begin at a multiple of 8 rows.
  GPU_DEVICE int nibble(int r) const { return (lane_step * lane_row() + shift(r)) & 7; }
};

// Shared: all waves of the block have the same items except for the rows, and share activations.
template <typename DT, int G, bool ZP, int R, int NB, bool Shared>
class GroupTile {
  static constexpr int kSets = 2 * R;
  static constexpr int kWindow = group_window_blocks(R);
  static constexpr int kRowBytes = group_row_bytes(R);
  static constexpr int kSetBytes = kBlockWeightBytes / 2;  // per row set and block
  static constexpr int kGroups = kBlockK / G;              // per block
  static constexpr int kWindowGroups = kWindow * kGroups;
  static constexpr int kHeld = (kWindowGroups + 3) / 4;  // groups whose scales a lane holds
  // With many columns, the slots of a list are the columns, and a list that leaves half of them
  // empty is multiplied without that half.
  static constexpr bool kHalves = NB > 2;
  // With few columns, a second product of -(offset + zero point) is cheaper than subtracting those
  // from every weight; the two products have separate sums.
  static constexpr bool kSubtracts = NB > 1;
  static constexpr int kSums = kSubtracts ? 1 : 2;

 public:
  using Sums = float[NB][R][4];

  // Multiplies blocks [first, last) of k. `ring` is the wave's LDS for weights; `rows` is the
  // wave's (Shared: the block's) LDS for `slots` activation rows.
  GPU_DEVICE GroupTile(const WeightStack& weights, const RowSets& sets, int first, int last, int k,
                       char* ring, char* rows, int slots, int waves)
      : weights_(weights),
        sets_(sets),
        first_(first),
        last_(last),
        k_(k),
        slots_(slots),
        first_slot_(Shared ? gpu::wave() : 0),
        slot_step_(Shared ? waves : 1),
        copy_to_(gpu::lds_address(ring) + 16 * (4 * lane_row() + (lane_k() ^ lane_row() / 2))),
        rows_(gpu::lds_address(rows)) {
    const int lane_blocks = (k - 32 * lane_k() + kBlockK - 1) >> kLog2BlockK;
    limit_ = lane_blocks < last ? lane_blocks : last;
    GPU_UNROLL
    for (int j = 0; j < 4; ++j) {
      unit_[j] =
          gpu::lds_address(ring) + (16 * (4 * lane_row() + (j ^ lane_row() / 2)) + 4 * lane_k());
    }
    GPU_UNROLL
    for (int b = 0; b < NB; ++b) {  // columns without a row repeat one; their results are unused
      const int slot = 8 * b + lane_row();
      act_[b] = rows_ + ((kHalves || slot < slots ? slot : slots - 1) * kRowBytes + 16 * lane_k());
    }
    GPU_UNROLL
    for (int r = 0; r < kSets; ++r) {
      q_[r] = weights.q;
      s_[r] = weights.scales;
      z_[r] = weights.zeros;
    }
  }

  // Multiplies. bool next(GroupItem&) gives the next item; copies enumerate the same items. wait()
  // returns when activations may be read; row_of(position in pairs) is such a row. begin(item) is
  // called before an item's product and done(item, sums) after it: sums[b][m][c] and
  // sums[b][m][2 + c] belong to row sets 2 * m and 2 * m + 1 and to pair 8 * b + 2 * lane_k() + c.
  template <typename Items, typename Wait, typename RowOf, typename Begin, typename Done>
  GPU_DEVICE void run(const Items& items, const Wait& wait, const RowOf& row_of, const Begin& begin,
                      const Done& done) {
    Place<Items> ask = start(items);
    if (ask.more) enter_weights(ask.item);
    GPU_UNROLL
    for (int w = 0; w + 1 < kGroupRing; ++w) {
      copy_weights(ask, w);
      load_scales(ask, w);
      if (advance(ask)) enter_weights(ask.item);
    }
    wait();
    ask = start(items);
    GPU_UNROLL
    for (int w = 0; w + 1 < kGroupRing; ++w) {
      copy_activations(ask, w, row_of);
      gpu::commit_copies();
      advance(ask);
    }

    Items current = items;
    GroupItem item;
    int w = 0, free = kGroupRing - 1;  // the current window and the one to fill
    GPU_ROLLED
    while (current.next(item)) {
      Sums sums = {};
      begin(item);
      GPU_ROLLED
      for (int block = first_; block < last_; block += kWindow) {
        gpu::wait_copies<kGroupRing - 2>();
        barrier();  // the copies of the others are done, and all reads of the previous window
        copy_weights(ask, free);
        copy_activations(ask, free, row_of);
        gpu::commit_copies();
        load_scales(ask, kGroupRing - 1);
        if constexpr (kHalves) {
          if (item.count > 4 * NB) {
            add_window<NB>(sums, block, w);
          } else {
            add_window<NB / 2>(sums, block, w);
          }
        } else {
          add_window<NB>(sums, block, w);
        }
        GPU_UNROLL
        for (int i = 0; i + 1 < kGroupRing; ++i) scales_[i] = scales_[i + 1];
        if (advance(ask)) enter_weights(ask.item);
        free = w;
        w = w + 1 == kGroupRing ? 0 : w + 1;
      }
      done(item, sums);
    }
    gpu::wait_all_copies();
    barrier();  // all reads of the ring are done
  }

 private:
  // The window to request next.
  template <typename Items>
  struct Place {
    Items items;
    GroupItem item;
    int block;
    bool more;
  };

  // Scales and zero points of a window: each lane loads one of four adjacent groups.
  struct Scales {
    uint16_t scale[kHeld][kSets];
    uint32_t zero[kHeld][kSets];
  };

  template <typename Items>
  GPU_DEVICE Place<Items> start(const Items& items) const {
    Place<Items> at = {items, {}, first_, false};
    at.more = at.items.next(at.item);
    return at;
  }

  // Moves to the next window; true if it belongs to another item.
  template <typename Items>
  GPU_DEVICE bool advance(Place<Items>& at) const {
    if (!at.more) return false;
    at.block += kWindow;
    if (at.block < last_) return false;
    at.block = first_;
    at.more = at.items.next(at.item);
    return at.more;
  }

  static GPU_DEVICE void barrier() {
    if constexpr (Shared) {
      gpu::block_barrier();
    } else {
      gpu::wave_barrier();
    }
  }

  GPU_DEVICE void enter_weights(const GroupItem& item) {
    GPU_UNROLL
    for (int r = 0; r < kSets; ++r) {
      const int row = sets_.row(item.row, r);
      q_[r] = weights_.q + item.expert * weights_.q_stride_e +
              (row * weights_.q_stride_n + first_ * (kBlockK / 8) + 4 * lane_k());
      s_[r] = weights_.scales + item.expert * weights_.s_stride_e +
              (row * weights_.s_stride_n + first_ * kGroups + lane_k());
      if constexpr (ZP) {
        z_[r] = weights_.zeros + item.expert * weights_.z_stride_e +
                (row / 8 * weights_.z_stride_n8 + first_ * kGroups + lane_k());
      }
    }
  }

  template <typename Items>
  GPU_DEVICE void copy_weights(const Place<Items>& at, int window) {
    if (!at.more) return;
    const gpu::LdsAddress to = copy_to_ + window * kGroupWindowBytes;
    GPU_UNROLL
    for (int i = 0; i < kWindow; ++i) {
      const bool real = at.block + i < limit_;
      GPU_UNROLL
      for (int r = 0; r < kSets; ++r) {
        gpu::copy_weights_async(to + (kSets * i + r) * kSetBytes, q_[r] + i * (kBlockK / 8), real);
      }
    }
    GPU_UNROLL
    for (int r = 0; r < kSets; ++r) q_[r] += kWindow * (kBlockK / 8);
  }

  template <typename Items>
  GPU_DEVICE void load_scales(const Place<Items>& at, int w) {
    const int left = at.more ? k_ / G - at.block * kGroups - lane_k() : 0;
    GPU_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      const bool real = 4 * j < left && 4 * j + lane_k() < kWindowGroups;
      GPU_UNROLL
      for (int r = 0; r < kSets; ++r) {
        scales_[w].scale[j][r] = 0;
        if (real) scales_[w].scale[j][r] = s_[r][4 * j];
        if constexpr (ZP) {
          scales_[w].zero[j][r] = 0;
          if (real) scales_[w].zero[j][r] = z_[r][4 * j];
        }
      }
    }
    GPU_UNROLL
    for (int r = 0; r < kSets; ++r) {
      s_[r] += kWindowGroups;
      if constexpr (ZP) z_[r] += kWindowGroups;
    }
  }

  // The lane copies 8 of every 256 activations of each row.
  template <typename Items, typename RowOf>
  GPU_DEVICE void copy_activations(const Place<Items>& at, int window, const RowOf& row_of) const {
    constexpr int kStep = 8 * gpu::kWaveSize;
    static_assert(kWindow * kBlockK % kStep == 0);
    if (!at.more) return;
    const int from = at.block * kBlockK + 8 * gpu::lane();
    const gpu::LdsAddress to = rows_ + (window * slots_ * kRowBytes + 16 * gpu::lane());
    // All addresses of a batch before its copies, so that finding them is waited for once. Few
    // columns have few rows per wave: batches of 4 took up to 4% longer there on an H200.
    constexpr int kBatch = NB > 2 ? 8 : 1;
    GPU_ROLLED
    for (int first = first_slot_; first < at.item.count; first += kBatch * slot_step_) {
      const uint16_t* row[kBatch];
      GPU_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int s = first + b * slot_step_;
        row[b] = row_of(at.item.first + (s < at.item.count ? s : first)) + from;
      }
      GPU_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int s = first + b * slot_step_;
        if (s >= at.item.count) break;
        GPU_UNROLL
        for (int i = 0; i < kWindow * kBlockK / kStep; ++i) {
          gpu::copy_16_async(to + (s * kRowBytes + 2 * i * kStep), row[b] + i * kStep,
                             from + i * kStep < k_);
        }
      }
    }
  }

  // Adds a window to the first 8 * N columns.
  template <int N>
  GPU_DEVICE void add_window(Sums& sums, int block, int window) const {
    const int weights_at = window * kGroupWindowBytes, rows_at = window * slots_ * kRowBytes;
    GPU_UNROLL
    for (int i = 0; i < kWindow; ++i) {
      if (block + i >= last_) break;
      float dot[N][R][kSums][4] = {};
      GPU_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int group = i * kGroups + 32 * j / G;
        multiply<N>(dot, i, j, weights_at, rows_at, group);
        if ((32 * j + 32) % G != 0) continue;
        GPU_UNROLL
        for (int r = 0; r < kSets; ++r) {
          const int bits = gpu::shuffle_in_quad<int>(scales_[0].scale[group / 4][r], group);
          const float scale = Format<DT>::to_float(static_cast<uint16_t>(bits));
          GPU_UNROLL
          for (int b = 0; b < N; ++b) {
            GPU_UNROLL
            for (int d = r % 2 * 2; d < r % 2 * 2 + 2; ++d) {
              float (&parts)[kSums][4] = dot[b][r / 2];
              float sum = parts[0][d];
              if constexpr (!kSubtracts) sum += parts[1][d];
              GPU_UNROLL
              for (int c = 0; c < kSums; ++c) parts[c][d] = 0.0f;
              sums[b][r / 2][d] += scale * sum;
            }
          }
        }
      }
    }
  }

  // Adds unit j of block i. A product waits for the sums of the one before, so products of
  // kColumns blocks of columns and all row sets run between two of the same sums.
  template <int N>
  GPU_DEVICE void multiply(float (&dot)[N][R][kSums][4], int i, int j, int weights_at, int rows_at,
                           int group) const {
    constexpr int kColumns = N < 2 ? 1 : 2;
    uint32_t w[R][2][4], z[R][2];
    GPU_UNROLL
    for (int m = 0; m < R; ++m) {
      const gpu::LdsAddress unit = unit_[j] + weights_at + (kSets * i + 2 * m) * kSetBytes;
      const uint32_t x = gpu::lds_load_4(unit), y = gpu::lds_load_4(unit + kSetBytes);
      const uint32_t zx = z[m][0] = minus(group, 2 * m), zy = z[m][1] = minus(group, 2 * m + 1);
      w[m][0][0] = weight<0>(x, zx);
      w[m][0][1] = weight<0>(y, zy);
      w[m][0][2] = weight<1>(x, zx);
      w[m][0][3] = weight<1>(y, zy);
      w[m][1][0] = weight<2>(x, zx);
      w[m][1][1] = weight<2>(y, zy);
      w[m][1][2] = weight<3>(x, zx);
      w[m][1][3] = weight<3>(y, zy);
    }
    GPU_UNROLL
    for (int first = 0; first < N; first += kColumns) {
      gpu::U32x4 a[kColumns];
      GPU_UNROLL
      for (int b = 0; b < kColumns; ++b) {
        const gpu::LdsAddress row =
            kHalves ? act_[0] + 8 * (first + b) * kRowBytes : act_[first + b];
        a[b] = gpu::lds_load_16(row + rows_at + (i * kBlockK * 2 + 64 * j));
      }
      GPU_UNROLL
      for (int half = 0; half < 2; ++half) {
        GPU_UNROLL
        for (int b = 0; b < kColumns; ++b) {
          const uint32_t acts[2] = {a[b].v[2 * half], a[b].v[2 * half + 1]};
          GPU_UNROLL
          for (int m = 0; m < R; ++m) {
            float (&d)[kSums][4] = dot[first + b][m];
            mma_16x8x16(DT{}, d[0], w[m][half], acts);
            if constexpr (!kSubtracts) {
              mma_16x8x16(DT{}, d[1], {z[m][0], z[m][1], z[m][0], z[m][1]}, acts);
            }
          }
        }
      }
    }
  }

  // The pair -(offset + zero point) of row set r.
  GPU_DEVICE uint32_t minus(int group, int r) const {
    int zero = kSymmetricZeroPoint;
    if constexpr (ZP) {
      const int word = gpu::shuffle_in_quad<int>(scales_[0].zero[group / 4][r], group);
      zero = word >> 4 * sets_.nibble(r) & 15;
    }
    return unpack_pair<DT, 0>(zero * 0x00010001u) ^ 0x80008000u;
  }

  template <int I>
  static GPU_DEVICE uint32_t weight(uint32_t word, uint32_t minus) {
    const uint32_t pair = unpack_pair<DT, I>(word);
    if constexpr (!kSubtracts) return pair;
    return add2(DT{}, pair, minus);
  }

  const WeightStack& weights_;
  RowSets sets_;
  int first_, last_, k_, slots_;
  int first_slot_, slot_step_;  // the rows that the wave copies
  int limit_;                   // first block in which the lane has no weights
  // In the first window: the destination of the lane's weights, its words, its activations.
  gpu::LdsAddress copy_to_, rows_, unit_[4], act_[NB];
  // The window to request next.
  const uint32_t *q_[kSets], *z_[kSets];
  const uint16_t* s_[kSets];
  Scales scales_[kGroupRing];
};

}  // namespace moe_int4
