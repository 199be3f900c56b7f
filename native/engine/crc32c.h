// CRC-32C (Castagnoli, reflected 0x82f63b78), as iSCSI and ext4 use it: initial value and final xor
// are ~0.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tunemesh {

// Continues a checksum: crc32c(b, crc32c(a)) is the checksum of a followed by b; start with 0.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);
// Table driven; for processors without the instruction, and for tests.
uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t crc = 0);

}  // namespace tunemesh
