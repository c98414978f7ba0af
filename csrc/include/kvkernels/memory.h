// Advice to the operating system about memory that others have allocated.
#pragma once

#include <cstdint>

namespace kvkernels {

// Asks for pages of 2 MiB under [data, data + num_bytes), where Linux leaves it to the program.
// Blocks lie scattered, and with pages of 4 KiB each one costs look-ups of many addresses: decode
// read 12 % more a second with large ones (one core of Zen 4). Nothing changes where it is refused.
void advise_huge_pages(void* data, int64_t num_bytes);

}  // namespace kvkernels
