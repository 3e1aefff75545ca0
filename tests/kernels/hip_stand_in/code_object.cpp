// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "code_object.h"

#include <elf.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>

namespace stand_in {
namespace {

constexpr int kMachineAmdgpu = 224;
constexpr uint32_t kMetadataNote = 32;

struct Value {
  uint64_t number = 0;
  std::string text;
  std::vector<Value> list;
  std::map<std::string, Value> map;

  const Value& at(const std::string& key) const {
    const auto found = map.find(key);
    if (found == map.end()) throw std::runtime_error("metadata without " + key);
    return found->second;
  }
};

// The MessagePack types that LLVM writes.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}

  Value value() {
    const uint8_t tag = *bytes(1);
    if (tag < 0x80) return number(tag);
    if (tag < 0x90) return map(tag & 15);
    if (tag < 0xa0) return list(tag & 15);
    if (tag < 0xc0) return text(tag & 31);
    switch (tag) {
      case 0xc2:
      case 0xc3:
        return number(tag & 1);
      case 0xcc:
      case 0xcd:
      case 0xce:
      case 0xcf:
        return number(big_endian(1 << (tag - 0xcc)));
      case 0xd9:
      case 0xda:
      case 0xdb:
        return text(big_endian(1 << (tag - 0xd9)));
      case 0xdc:
      case 0xdd:
        return list(big_endian(tag == 0xdc ? 2 : 4));
      case 0xde:
      case 0xdf:
        return map(big_endian(tag == 0xde ? 2 : 4));
      default:
        throw std::runtime_error("metadata of an unknown type " + std::to_string(tag));
    }
  }

 private:
  const uint8_t* bytes(size_t count) {
    if (static_cast<size_t>(end_ - next_) < count) throw std::runtime_error("metadata cut short");
    next_ += count;
    return next_ - count;
  }
  uint64_t big_endian(int count) {
    uint64_t value = 0;
    for (int i = 0; i < count; ++i) value = value << 8 | *bytes(1);
    return value;
  }
  Value number(uint64_t x) {
    Value v;
    v.number = x;
    return v;
  }
  Value text(size_t size) {
    Value v;
    v.text.assign(reinterpret_cast<const char*>(bytes(size)), size);
    return v;
  }
  Value list(size_t size) {
    Value v;
    for (size_t i = 0; i < size; ++i) v.list.push_back(value());
    return v;
  }
  Value map(size_t size) {
    Value v;
    for (size_t i = 0; i < size; ++i) {
      const std::string key = value().text;
      v.map[key] = value();
    }
    return v;
  }

  const uint8_t *next_, *end_;
};

Value metadata(const uint8_t* image, const Elf64_Ehdr& header) {
  for (int i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    std::memcpy(&segment, image + header.e_phoff + i * sizeof(segment), sizeof(segment));
    if (segment.p_type != PT_NOTE) continue;
    for (size_t at = 0; at + sizeof(Elf64_Nhdr) <= segment.p_filesz;) {
      Elf64_Nhdr note;
      const uint8_t* const start = image + segment.p_offset + at;
      std::memcpy(&note, start, sizeof(note));
      const size_t name_bytes = (note.n_namesz + 3) / 4 * 4;
      if (note.n_type == kMetadataNote) {
        return Reader(start + sizeof(note) + name_bytes, note.n_descsz).value();
      }
      at += sizeof(note) + name_bytes + (note.n_descsz + 3) / 4 * 4;
    }
  }
  throw std::runtime_error("no metadata note");
}

std::set<std::string> symbols(const uint8_t* image, const Elf64_Ehdr& header) {
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  std::memcpy(sections.data(), image + header.e_shoff, sections.size() * sizeof(Elf64_Shdr));
  std::set<std::string> names;
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_DYNSYM) continue;
    for (size_t at = 0; at < section.sh_size; at += sizeof(Elf64_Sym)) {
      Elf64_Sym symbol;
      std::memcpy(&symbol, image + section.sh_offset + at, sizeof(symbol));
      const char* const strings = reinterpret_cast<const char*>(image);
      names.insert(strings + sections[section.sh_link].sh_offset + symbol.st_name);
    }
  }
  return names;
}

}  // namespace

CodeObject read_code_object(const void* data) {
  const auto* const image = static_cast<const uint8_t*>(data);
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof(header));
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_machine != kMachineAmdgpu) {
    throw std::runtime_error("not an AMDGPU code object");
  }
  const Value root = metadata(image, header);
  const std::set<std::string> names = symbols(image, header);
  CodeObject code;
  const std::string& target = root.at("amdhsa.target").text;  // amdgcn-amd-amdhsa--gfx1151
  code.arch = target.substr(target.rfind('-') + 1);
  for (const Value& row : root.at("amdhsa.kernels").list) {
    Kernel kernel;
    kernel.name = row.at(".name").text;
    for (const std::string& symbol : {kernel.name, row.at(".symbol").text}) {
      if (names.count(symbol) == 0) throw std::runtime_error("no symbol " + symbol);
    }
    for (const Value& argument : row.at(".args").list) {
      kernel.arguments.push_back({argument.at(".offset").number, argument.at(".size").number,
                                  argument.at(".value_kind").text});
    }
    kernel.kernarg_bytes = row.at(".kernarg_segment_size").number;
    kernel.lds_bytes = row.at(".group_segment_fixed_size").number;
    kernel.max_threads = row.at(".max_flat_workgroup_size").number;
    kernel.wave_size = row.at(".wavefront_size").number;
    code.kernels.push_back(std::move(kernel));
  }
  return code;
}

}  // namespace stand_in
