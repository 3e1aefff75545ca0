// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// AMX tile instructions in plain C++, for machines without AMX. This file is included before a
// kernel source (-include) and replaces the compiler's intrinsics. It accesses memory element by
// element, so that AddressSanitizer checks every byte. It ends the program on anything that the
// processor would reject, and on use of an unconfigured tile.
//
// Intel SDM volume 1, chapter 18; volume 2, LDTILECFG and TDP*.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Unnamed, as in the kernels: each source has its own flags, so sources share no inline functions.
namespace amx_emulation {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

inline Config config;
inline bool configured = false;
inline uint8_t tiles[kTiles][kRows][kRowBytes];

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

inline void require_tile(int tile) {
  require(configured, "tiles are not configured");
  require(tile >= 0 && tile < kTiles && config.rows[tile] > 0, "tile is not configured");
}

inline void load_config(const void* from) {
  std::memcpy(&config, from, sizeof(config));
  require(config.palette == 1, "palette is not 1");
  require(config.start_row == 0, "starts in the middle of a tile");
  for (const uint8_t byte : config.reserved) require(byte == 0, "reserved byte is not 0");
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], bytes = config.row_bytes[i];
    require(rows <= kRows && bytes <= kRowBytes, "tile is too large");
    require((rows == 0) == (bytes == 0), "tile has rows without columns, or the reverse");
    require(i < kTiles || rows == 0, "there are 8 tiles");
  }
  configured = true;
  std::memset(tiles, 0, sizeof(tiles));
}

inline void release() {
  require(configured, "released twice");
  configured = false;
}

inline void zero(int tile) {
  require_tile(tile);
  std::memset(tiles[tile], 0, sizeof(tiles[tile]));
}

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < config.rows[tile]; ++row) {
    const auto* bytes = static_cast<const uint8_t*>(from) + row * stride;
    for (int i = 0; i < config.row_bytes[tile]; ++i) tiles[tile][row][i] = bytes[i];
  }
}

inline void store(int tile, void* to, int64_t stride) {
  require_tile(tile);
  for (int row = 0; row < config.rows[tile]; ++row) {
    auto* bytes = static_cast<uint8_t*>(to) + row * stride;
    for (int i = 0; i < config.row_bytes[tile]; ++i) bytes[i] = tiles[tile][row][i];
  }
}

inline float to_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// c[m][n] += sum over k and i of a[m][k][i] * b[k][n][i], where elements of four bytes hold
// 4 / sizeof(A) values.
template <typename Sum, typename A, typename B, typename Product>
inline void multiply(int c, int a, int b, Product product) {
  constexpr int kValues = 4 / sizeof(A);
  require_tile(c);
  require_tile(a);
  require_tile(b);
  require(c != a && a != b && c != b, "operands are the same tile");
  require(config.rows[c] == config.rows[a], "rows of c and a differ");
  require(config.row_bytes[c] == config.row_bytes[b], "columns of c and b differ");
  require(config.row_bytes[a] == 4 * config.rows[b], "columns of a are not rows of b");
  A left[kRows][kRowBytes / sizeof(A)];
  B right[kRows][kRowBytes / sizeof(B)];
  std::memcpy(left, tiles[a], sizeof(left));
  std::memcpy(right, tiles[b], sizeof(right));
  for (int m = 0; m < config.rows[c]; ++m) {
    Sum sums[kRowBytes / sizeof(Sum)];
    std::memcpy(sums, tiles[c][m], sizeof(sums));
    for (int k = 0; k < config.rows[b]; ++k) {
      for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
        for (int i = 0; i < kValues; ++i) {
          sums[n] += product(left[m][kValues * k + i], right[k][kValues * n + i]);
        }
      }
    }
    std::memcpy(tiles[c][m], sums, sizeof(sums));
  }
}

inline void multiply_unsigned_signed(int c, int a, int b) {
  multiply<int32_t, uint8_t, int8_t>(c, a, b, [](int x, int y) { return x * y; });
}

inline void multiply_bf16(int c, int a, int b) {
  multiply<float, uint16_t, uint16_t>(
      c, a, b, [](uint16_t x, uint16_t y) { return to_float(x) * to_float(y); });
}

}  // namespace
}  // namespace amx_emulation

// The compiler's intrinsics are macros too, because their operands are immediates.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulation::load_config
#define _tile_release amx_emulation::release
#define _tile_zero amx_emulation::zero
#define _tile_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_dpbusd amx_emulation::multiply_unsigned_signed
#define _tile_dpbf16ps amx_emulation::multiply_bf16
