// The matrix-tile attention with its instructions emulated.
#include "cpu/attention_amx_kernel.h"
#include "cpu/tiles_emulated.h"

namespace kvkernels {

const AttentionKernel* amx_emulated_kernel(DType dtype, HeadDims dims) {
  return tile_kernel<EmulatedTiles, attend_codes_amx_emulated>(dtype, dims);
}

}  // namespace kvkernels
