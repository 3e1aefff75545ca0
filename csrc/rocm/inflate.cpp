// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "inflate.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace gpu {
namespace {

[[noreturn]] void damaged(const char* what) {
  throw std::runtime_error(std::string("damaged zlib stream: ") + what);
}

// The stream as bits, least significant bit first.
class Bits {
 public:
  Bits(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}

  // The next `count` bits, at most 16, without consuming them; zeros follow the end.
  uint32_t peek(int count) {
    while (held_ < count) {
      if (next_ != end_) {
        bits_ |= static_cast<uint64_t>(*next_++) << held_;
      } else {
        ++past_end_;
      }
      held_ += 8;
    }
    return bits_ & ((1u << count) - 1);
  }
  void drop(int count) {
    bits_ >>= count;
    held_ -= count;
    if (past_end_ * 8 > held_) damaged("it ends early");
  }
  uint32_t take(int count) {
    const uint32_t value = peek(count);
    drop(count);
    return value;
  }
  void to_byte_boundary() { drop(held_ % 8); }

 private:
  const uint8_t *next_, *end_;
  uint64_t bits_ = 0;
  int held_ = 0, past_end_ = 0;
};

constexpr int kMaxLength = 15;  // of a Huffman code, in bits

// A canonical Huffman code as a table indexed by the next kMaxLength bits.
class Huffman {
 public:
  Huffman(const uint8_t* lengths, int count) : table_(1 << kMaxLength) {
    int with_length[kMaxLength + 1] = {}, next[kMaxLength + 1] = {};
    for (int i = 0; i < count; ++i) ++with_length[lengths[i]];
    with_length[0] = 0;
    int code = 0;
    for (int length = 1; length <= kMaxLength; ++length) {
      code = (code + with_length[length - 1]) << 1;
      next[length] = code;
      if (code + with_length[length] > 1 << length) damaged("more codes than fit");
    }
    for (int symbol = 0; symbol < count; ++symbol) {
      const int length = lengths[symbol];
      if (length == 0) continue;
      int reversed = 0;  // codes are stored most significant bit first
      for (int i = 0, left = next[length]++; i < length; ++i, left >>= 1) {
        reversed = reversed << 1 | (left & 1);
      }
      for (int at = reversed; at < 1 << kMaxLength; at += 1 << length) {
        table_[at] = static_cast<uint16_t>(symbol << 4 | length);
      }
    }
  }
  int read(Bits& bits) const {
    const uint16_t entry = table_[bits.peek(kMaxLength)];
    if (entry == 0) damaged("an unassigned code");
    bits.drop(entry & 15);
    return entry >> 4;
  }

 private:
  std::vector<uint16_t> table_;  // symbol << 4 | length of its code; 0: unassigned
};

class Output {
 public:
  Output(uint8_t* data, size_t size) : data_(data), size_(size) {}
  void literal(uint8_t byte) {
    if (done_ == size_) damaged("more bytes than expected");
    data_[done_++] = byte;
  }
  void copy(size_t distance, size_t length) {
    if (distance > done_) damaged("a copy from before the start of the output");
    for (; length > 0; --length) literal(data_[done_ - distance]);  // source and copy may overlap
  }
  size_t done() const { return done_; }

 private:
  uint8_t* data_;
  size_t size_, done_ = 0;
};

// Lengths (symbols 257..) and distances (symbols 0..): first value and number of extra bits.
constexpr uint16_t kLengthBase[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                    31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr uint8_t kLengthBits[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                   2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
constexpr uint16_t kDistanceBase[] = {
    1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
    193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
constexpr int kLengths = 29, kDistances = 30;

void inflate_block(Bits& bits, const Huffman& literals, const Huffman& distances, Output& out) {
  for (;;) {
    const int symbol = literals.read(bits);
    if (symbol == 256) return;
    if (symbol < 256) {
      out.literal(static_cast<uint8_t>(symbol));
      continue;
    }
    const int kind = symbol - 257;
    if (kind >= kLengths) damaged("an invalid length");
    const uint32_t length = kLengthBase[kind] + bits.take(kLengthBits[kind]);
    const int far = distances.read(bits);
    if (far >= kDistances) damaged("an invalid distance");
    out.copy(kDistanceBase[far] + bits.take(far < 2 ? 0 : far / 2 - 1), length);
  }
}

void inflate_stored(Bits& bits, Output& out) {
  bits.to_byte_boundary();
  const uint32_t length = bits.take(16);
  if ((bits.take(16) ^ length) != 0xffff) damaged("the wrong length of a stored block");
  for (uint32_t i = 0; i < length; ++i) out.literal(static_cast<uint8_t>(bits.take(8)));
}

void inflate_fixed(Bits& bits, Output& out) {
  uint8_t lengths[288], distances[32];
  for (int i = 0; i < 288; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
  std::memset(distances, 5, sizeof(distances));
  inflate_block(bits, Huffman(lengths, 288), Huffman(distances, 32), out);
}

void inflate_dynamic(Bits& bits, Output& out) {
  constexpr uint8_t order[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
  const int literals = bits.take(5) + 257, distances = bits.take(5) + 1, counted = bits.take(4) + 4;
  uint8_t code_lengths[19] = {};
  for (int i = 0; i < counted; ++i) code_lengths[order[i]] = static_cast<uint8_t>(bits.take(3));
  const Huffman code(code_lengths, 19);
  uint8_t lengths[288 + 32] = {};
  for (int i = 0; i < literals + distances;) {
    const int symbol = code.read(bits);
    int repeat = 1;
    uint8_t value = static_cast<uint8_t>(symbol);
    if (symbol == 16) {
      if (i == 0) damaged("a repeat without a previous length");
      value = lengths[i - 1];
      repeat = 3 + bits.take(2);
    } else if (symbol > 16) {
      value = 0;
      repeat = symbol == 17 ? 3 + bits.take(3) : 11 + bits.take(7);
    }
    if (i + repeat > literals + distances) damaged("too many code lengths");
    for (; repeat > 0; --repeat) lengths[i++] = value;
  }
  inflate_block(bits, Huffman(lengths, literals), Huffman(lengths + literals, distances), out);
}

uint32_t adler32(const uint8_t* data, size_t size) {
  constexpr uint32_t kPrime = 65521;
  uint32_t a = 1, b = 0;
  for (size_t i = 0; i < size; ++i) {
    a = (a + data[i]) % kPrime;
    b = (b + a) % kPrime;
  }
  return b << 16 | a;
}

}  // namespace

void inflate(const uint8_t* data, size_t size, uint8_t* out_data, size_t out_size) {
  Bits bits(data, size);
  const uint32_t method = bits.take(8), flags = bits.take(8);
  if ((method & 15) != 8 || (method * 256 + flags) % 31 != 0 || (flags & 32) != 0) {
    damaged("its header");
  }
  Output out(out_data, out_size);
  for (bool last = false; !last;) {
    last = bits.take(1) != 0;
    switch (bits.take(2)) {
      case 0:
        inflate_stored(bits, out);
        break;
      case 1:
        inflate_fixed(bits, out);
        break;
      case 2:
        inflate_dynamic(bits, out);
        break;
      default:
        damaged("an unknown type of block");
    }
  }
  if (out.done() != out_size) damaged("fewer bytes than expected");
  bits.to_byte_boundary();
  uint32_t expected = 0;
  for (int i = 0; i < 4; ++i) expected = expected << 8 | bits.take(8);
  if (adler32(out_data, out_size) != expected) damaged("its checksum");
}

}  // namespace gpu
