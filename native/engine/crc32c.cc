#include "engine/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace tunemesh {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;

constexpr std::array<uint32_t, 256> byte_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    table[i] = crc;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kByteTable = byte_table();

uint32_t update_byte(uint32_t state, uint8_t byte) {
  return (state >> 8) ^ kByteTable[(state ^ byte) & 0xff];
}

#if defined(__x86_64__)
// The instruction takes three cycles and starts every cycle, so three streams run side by side;
// their states are joined by moving one over the zero bytes of the next (Gopal et al., Intel 2011;
// tables after Adler's crc32c.c).
constexpr size_t kStreamBytes = 4096;

using ZeroTables = std::array<std::array<uint32_t, 256>, 4>;

ZeroTables make_zero_tables() {
  std::array<uint32_t, 32> basis{};
  for (int bit = 0; bit < 32; ++bit) {
    uint32_t state = uint32_t{1} << bit;
    for (size_t i = 0; i < kStreamBytes; ++i) state = update_byte(state, 0);
    basis[bit] = state;
  }
  ZeroTables tables{};
  for (int byte = 0; byte < 4; ++byte) {
    for (uint32_t value = 0; value < 256; ++value) {
      for (int bit = 0; bit < 8; ++bit) {
        if (value & (1u << bit)) tables[byte][value] ^= basis[8 * byte + bit];
      }
    }
  }
  return tables;
}

uint32_t over_zeros(const ZeroTables& tables, uint32_t state) {
  return tables[0][state & 0xff] ^ tables[1][(state >> 8) & 0xff] ^
         tables[2][(state >> 16) & 0xff] ^ tables[3][state >> 24];
}

uint64_t load_word(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

__attribute__((target("sse4.2"))) uint32_t update_hardware(uint32_t state, const uint8_t* data,
                                                           size_t bytes) {
  static const ZeroTables tables = make_zero_tables();
  while (bytes >= 3 * kStreamBytes) {
    uint64_t a = state, b = 0, c = 0;
    for (size_t i = 0; i < kStreamBytes; i += 8) {
      a = _mm_crc32_u64(a, load_word(data + i));
      b = _mm_crc32_u64(b, load_word(data + kStreamBytes + i));
      c = _mm_crc32_u64(c, load_word(data + 2 * kStreamBytes + i));
    }
    state = over_zeros(tables, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    state = over_zeros(tables, state) ^ static_cast<uint32_t>(c);
    data += 3 * kStreamBytes;
    bytes -= 3 * kStreamBytes;
  }
  uint64_t wide = state;
  for (; bytes >= 8; data += 8, bytes -= 8) wide = _mm_crc32_u64(wide, load_word(data));
  state = static_cast<uint32_t>(wide);
  for (; bytes > 0; ++data, --bytes) state = _mm_crc32_u8(state, *data);
  return state;
}
#endif

}  // namespace

uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t crc) {
  const auto* at = static_cast<const uint8_t*>(data);
  uint32_t state = ~crc;
  for (size_t i = 0; i < bytes; ++i) state = update_byte(state, at[i]);
  return ~state;
}

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) {
    return ~update_hardware(~crc, static_cast<const uint8_t*>(data), bytes);
  }
#endif
  return crc32c_portable(data, bytes, crc);
}

}  // namespace tunemesh
