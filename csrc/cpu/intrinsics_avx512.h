// The intrinsics (immintrin.h), without the warnings that they cause.
#pragma once

// GCC 12 warns about the lanes that its own intrinsics leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
